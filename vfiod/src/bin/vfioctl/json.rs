//! What came over the bus as JSON, whatever it is: no command restates the interface's fields.
//! Pure.

use serde_json::{Map, Value};
use zbus::wire::{Structure, Variant};

/// The arguments of a message: the one there is, or all in an array.
pub(crate) fn from_body(arguments: &Structure<'_>) -> Value {
    match arguments.fields() {
        [one] => from_variant(one),
        all => all.iter().map(from_variant).collect(),
    }
}

/// Any value. Dictionaries become objects with their keys in order; what JSON cannot say (a
/// descriptor, a number that is none) becomes null.
pub(crate) fn from_variant(value: &Variant<'_>) -> Value {
    match value {
        Variant::Bool(value) => (*value).into(),
        Variant::U8(value) => (*value).into(),
        Variant::I16(value) => (*value).into(),
        Variant::U16(value) => (*value).into(),
        Variant::I32(value) => (*value).into(),
        Variant::U32(value) => (*value).into(),
        Variant::I64(value) => (*value).into(),
        Variant::U64(value) => (*value).into(),
        Variant::F64(value) => (*value).into(),
        Variant::Str(value) => value.as_str().into(),
        Variant::Signature(value) => value.to_string().into(),
        Variant::ObjectPath(value) => value.as_str().into(),
        Variant::Variant(value) => from_variant(value),
        Variant::Array(values) => values.iter().map(from_variant).collect(),
        Variant::Structure(values) => values.fields().iter().map(from_variant).collect(),
        Variant::Dict(entries) => {
            let entry = |(key, value)| (key_text(key), from_variant(value));
            entries.iter().map(entry).collect::<Map<_, _>>().into()
        }
        Variant::Fd(_) => Value::Null,
    }
}

fn key_text(key: &Variant<'_>) -> String {
    match from_variant(key) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use libvfio::client::{DeviceRecord, LeaseRecord, StepRecord};
    use libvfio::error::ErrorKind;
    use serde::Serialize;
    use serde_json::json;
    use zbus::Message;
    use zbus::wire::DynamicType;

    use super::*;

    /// As it is after a way over the bus.
    fn sent<T: Serialize + DynamicType>(value: &T) -> Value {
        let message = Message::signal("/", "a.b", "C").build(value).unwrap();
        from_body(&message.body().deserialize().unwrap())
    }

    #[test]
    fn a_record_keeps_its_fields_and_leaves_out_what_is_unknown() {
        let record = DeviceRecord {
            address: "0000:03:00.0".into(),
            vendor: Some(0x10de),
            link_speed: Some(2.5),
            boot_vga: Some(false),
            upstream: Some(vec!["0000:00:01.0".into()]),
            ..DeviceRecord::default()
        };
        assert_eq!(
            sent(&(vec![record],)),
            json!([{
                "address": "0000:03:00.0",
                "boot_vga": false,
                "class_name": "",
                "isolation": "",
                "link_speed": 2.5,
                "name": "",
                "upstream": ["0000:00:01.0"],
                "vendor": 0x10de
            }])
        );
    }

    #[test]
    fn records_within_records_are_objects() {
        let step = StepRecord { step: "bind".into(), ..StepRecord::default() };
        let lease = LeaseRecord { created: u64::MAX, steps: vec![step], ..LeaseRecord::default() };
        let value = sent(&(lease,));
        assert_eq!(value["created"], json!(u64::MAX));
        assert_eq!(value["steps"], json!([{"step": "bind", "text": ""}]));
    }

    #[test]
    fn other_shapes_have_a_form_too() {
        assert_eq!(sent(&("a", vec![1u8, 2])), json!(["a", [1, 2]]));
        assert_eq!(sent(&(HashMap::from([(7u32, (true, -1i64))]),)), json!({"7": [true, -1]}));
        assert_eq!(sent(&(f64::NAN,)), Value::Null);
    }

    const DOCUMENT: &str = include_str!("../../../../docs/vfioctl-json.md");

    #[test]
    fn the_document_names_every_field_of_every_record() {
        let records = [
            include_str!("../../../../libvfio/src/client/records.rs"),
            include_str!("../../../../libvfio/src/client/holding.rs"),
            include_str!("../../../../libvfio/src/client/policy.rs"),
        ];
        let fields: Vec<&str> = records
            .iter()
            .flat_map(|file| file.lines())
            .filter_map(|line| line.strip_prefix("    pub ")?.split_once(':'))
            .map(|(field, _)| field)
            .filter(|field| !field.contains(' '))
            .collect();
        assert!(fields.len() > 60, "the records were not read");
        for field in fields {
            assert!(DOCUMENT.contains(&format!("`{field}`")), "{field}");
        }
    }

    #[test]
    fn the_document_names_every_kind_of_step_and_every_code_of_a_reason() {
        for kind in libvfio::step::Step::KINDS {
            assert!(DOCUMENT.contains(&format!("`{kind}`")), "{kind}");
        }
        let plans = concat!(env!("CARGO_MANIFEST_DIR"), "/../libvfio/src/plan");
        let mut codes = Vec::new();
        for file in std::fs::read_dir(plans).unwrap() {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            // A code comes after a kind, or is named as one.
            let after_kind = text.split("ErrorKind::").skip(1).filter_map(|rest| {
                let (_, rest) = rest.split_once(',')?;
                rest.trim_start().strip_prefix('"')?.split_once('"')
            });
            let named = text.split("code: \"").skip(1).filter_map(|rest| rest.split_once('"'));
            codes.extend(after_kind.chain(named).map(|(code, _)| code.to_owned()));
        }
        assert!(codes.len() > 30, "the codes were not read: {codes:?}");
        for code in codes {
            assert!(DOCUMENT.contains(&format!("`{code}`")), "{code}");
        }
    }

    #[test]
    fn the_document_names_every_failure_with_its_status() {
        for kind in ErrorKind::ALL {
            let row = format!("| {} | `{}` |", kind.exit_status(), kind.name());
            assert!(DOCUMENT.contains(&row), "{row}");
        }
    }
}
