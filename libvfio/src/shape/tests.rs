use super::*;

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

#[test]
fn addresses_are_of_one_interface_and_written_out() {
    let mac = Setting::Mac.check(text("52:54:00:AB:cd:01")).unwrap();
    assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
    for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:1", "01:00:5e:00:00:01", "5254.00ab.cd01"] {
        assert!(Setting::Mac.check(text(bad)).is_err(), "{bad}");
    }
}

#[test]
fn what_no_device_could_have_is_refused_with_the_form() {
    for (setting, bad, why) in [
        (Setting::Vlan, Value::Number(4095), "1 to 4094"),
        (Setting::Link, text("sideways"), "auto, up or down"),
        (Setting::MaxRate, Value::Number(1 << 32), "number"),
        (Setting::Msix, Value::Number(0), "at least 1"),
        (Setting::SchedPriority, text("urgent"), "low, normal or high"),
        (Setting::VgpuType, Value::Number(0), "vf show"),
        (Setting::VgpuParams, text("a=1\nb=2"), "line"),
        (Setting::Trust, text("on"), "boolean"),
    ] {
        let error = Shape::default().set(setting, bad).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn every_setting_is_found_by_its_name() {
    for setting in Setting::ALL {
        assert_eq!(Setting::from_name(setting.name()), Some(setting));
    }
    assert!(Setting::ALL.is_sorted(), "steps come in the order of the names");
}

#[test]
fn limits_say_what_may_be() {
    let of = |setting, value, limits| Capability { setting, value, limits };
    let number = Value::Number;
    let rate = of(Setting::MaxRate, number(0), Limits::Range { least: 0, most: Some(1000) });
    assert!(rate.admits(&number(1000)) && !rate.admits(&number(1001)));
    assert_eq!(rate.allowed(), "0 to 1000 Mbit/s");
    let msix = of(Setting::Msix, number(4), Limits::Share { least: 1, spare: 6 });
    assert!(msix.admits(&number(10)) && !msix.admits(&number(11)) && !msix.admits(&number(0)));
    assert_eq!(msix.allowed(), "1 to 10");
    let choices = ["low", "normal"].map(Choice::plain).to_vec();
    let priority = of(Setting::SchedPriority, text("low"), Limits::Choices(choices));
    assert!(priority.admits(&text("normal")) && !priority.admits(&text("high")));
    let fixed = of(Setting::SchedPriority, text("low"), Limits::Fixed);
    assert!(fixed.admits(&text("low")) && !fixed.admits(&text("normal")));
}
