use super::*;
use crate::scrub::ReadBack;

fn source(name: &str, text: &str) -> Source {
    Source { name: name.to_owned(), text: text.to_owned() }
}

fn wrong(text: &str) -> Vec<String> {
    let problems = Policy::parse(&[source("p", text)]).expect_err(text);
    problems.0.iter().map(ToString::to_string).collect()
}

const POOL: &str = "[pool.gpus]\nmode = 'on-lease'\nselect = [{ class = 'gpu' }]\n";

#[test]
fn what_is_said_is_what_is_read_and_the_rest_has_its_default() {
    let text = "
boot.limit = 5
[pool.net]
mode = 'passthrough'
select = [{ vendor = '8086', device = '0x10c9' }, { path = '0000:00/04.0', numa-node = 1 }]
except = [{ address = '81:00.0' }]
vfs = 4
shape = { vlan = 7, link = 'up', trust = false }
reset-order = ['flr', 'bus']
d3cold = false
users = ['alice']
groups = ['vmops']
tenants = ['ops-*']
isolation = 'no-interrupt-remapping'
keep-for-host = 1
correct-drift = true
reset = 'if-possible'
scrub = { command = ['/sbin/wipe', '-a'], timeout = 7, driver = 'igb' }
";
    let policy = Policy::parse(&[source("a", text), source("b", POOL)]).unwrap();
    assert_eq!(policy.files, ["a", "b"]);
    assert_eq!(policy.boot_limit, Duration::from_secs(5));
    let [gpus, net] = &policy.pools[..] else { panic!("{policy:?}") };
    assert_eq!((gpus.mode, gpus.isolation, gpus.vfs), (Mode::OnLease, Isolation::Full, None));
    assert_eq!((net.mode, net.vfs, net.keep_for_host), (Mode::Passthrough, Some(4), 1));
    assert_eq!((net.select[0].vendor, net.select[0].device), (Some(0x8086), Some(0x10c9)));
    let shape: Vec<String> =
        net.shape.each().map(|(setting, value)| format!("{} {value}", setting.name())).collect();
    assert_eq!(shape, ["vlan 7", "trust off", "link up"]);
    assert_eq!(net.place.to_string(), "a:3:7");
    assert!(net.correct_drift && net.d3cold == Some(false));
    assert_eq!((net.reset, gpus.reset), (Resets::IfPossible, Resets::Required));
    let (command, driver) = (vec!["/sbin/wipe".into(), "-a".into()], Some("igb".into()));
    assert_eq!(net.scrub, scrub::Rule::Command { command, timeout: 7, driver });
    assert_eq!(gpus.scrub, scrub::Rule::Known);
    let scrub = |word: &str| {
        let text = format!("{POOL}scrub = '{word}'");
        Policy::parse(&[source("a", &text)]).unwrap().pools.remove(0).scrub
    };
    let all = [
        scrub::Rule::BarZero(ReadBack::Full),
        scrub::Rule::BarZero(ReadBack::Sampled),
        scrub::Rule::Nvme,
        scrub::Rule::None,
    ];
    assert_eq!(scrub::Rule::NAMES.map(scrub), all);
    assert!(net.lessees.serves("ops-7") && !net.lessees.serves("alice"));
    assert!(gpus.lessees.serves("anyone") && !gpus.lessees.names_callers());
}

#[test]
fn every_fault_is_told_with_its_place_and_the_nearest_word() {
    let cases = [
        (
            format!("{POOL}tenant = ['a']"),
            "p:4:1: there is no key 'tenant' in [pool.NAME]; did you mean 'tenants'?",
        ),
        ("[pools.a]".into(), "p:1:2: there is no key 'pools' in file; did you mean 'pool'?"),
        ("boot.limt = 3".into(), "p:1:6: there is no key 'limt' in [boot]; did you mean 'limit'?"),
        (
            POOL.replace("class", "clas"),
            "p:3:13: there is no key 'clas' in selector; did you mean 'class'?",
        ),
        (POOL.replace("'gpu'", "'gpus'"), "p:3:21: 'gpus' is no class; did you mean 'gpu'?"),
        (
            POOL.replace("on-lease", "on-leese"),
            "p:2:8: 'on-leese' is no mode; did you mean 'on-lease'?",
        ),
        (format!("{POOL}isolation = 'ful'"), "p:4:13: 'ful' is no isolation; did you mean 'full'?"),
        (
            format!("{POOL}reset-order = ['frl']"),
            "p:4:16: 'frl' is no reset method; did you mean 'flr'?",
        ),
        (
            format!("{POOL}scrub = 'bar-zero-samples'"),
            "p:4:9: 'bar-zero-samples' is no scrubber; did you mean 'bar-zero-sampled'?",
        ),
        (format!("{POOL}scrub = 'nmve'"), "p:4:9: 'nmve' is no scrubber; did you mean 'nvme'?"),
        (
            format!("{POOL}scrub = 1"),
            "p:4:9: 'scrub' takes a text or a table, and this is 1; correct it",
        ),
        (
            format!("{POOL}scrub = {{ command = ['/a'], timout = 3 }}"),
            "p:4:29: there is no key 'timout' in [pool.NAME.scrub]; did you mean 'timeout'?",
        ),
        (
            format!("{POOL}scrub = {{ command = '/a' }}"),
            "p:4:21: 'command' takes an array of texts, and this is '/a'; correct it",
        ),
        (
            format!("{POOL}scrub = {{ command = ['/a'], timeout = 0 }}"),
            "p:4:39: 'timeout' takes a number from 1 to 86400, and this is 0; correct it",
        ),
        (
            format!("{POOL}reset = 'requird'"),
            "p:4:9: 'requird' is no kind of reset; did you mean 'required'?",
        ),
        (
            format!("{POOL}vfs = 0"),
            "p:4:7: 'vfs' takes a number from 1 to 65535, and this is 0; correct it",
        ),
        (
            format!("{POOL}d3cold = 'no'"),
            "p:4:10: 'd3cold' takes true or false, and this is 'no'; correct it",
        ),
        (
            format!("{POOL}users = 'alice'"),
            "p:4:9: 'users' takes an array of texts, and this is 'alice'; correct it",
        ),
        (
            "boot.limit = 601".into(),
            "p:1:14: 'limit' takes a number from 1 to 600, and this is 601; correct it",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(wrong(&text), [expected], "{text}");
    }
}

#[test]
fn faults_are_told_in_the_order_of_their_places() {
    let text = "[pool.a]\nmode = 'passthru'\nselekt = []\nd3cold = []\n[pools.b]\n";
    let told = wrong(text);
    let lines: Vec<&str> = told.iter().map(|fault| &fault[..3]).collect();
    assert_eq!(lines, ["p:1", "p:2", "p:3", "p:4", "p:5"], "{told:#?}");
    assert!(told[3].ends_with("and this is an array; correct it"), "{told:#?}");
}

#[test]
fn what_contradicts_itself_is_no_policy() {
    let cases = [
        (POOL.replace("on-lease", "host") + "groups = ['a']", "p:4:1", "pool 'gpus' is the host's"),
        (POOL.to_owned() + "shape = { vlan = 1 }", "p:4:1", "the pool makes none"),
        (POOL.replace("class = 'gpu'", ""), "p:3:11", "every device of the host would be"),
        (POOL.replace("{ class = 'gpu' }", ""), "p:3:10", "selects nothing"),
        (POOL.replace("class = 'gpu'", "device = '2684'"), "p:3:11", "'device' without 'vendor'"),
        ("[pool.'a b']\nmode = 'host'\nselect = [{ class = 'nic' }]".into(), "p:1:7", "no name"),
        ("[pool.a]\nselect = [{ class = 'nic' }]".into(), "p:1:7", "has no 'mode'"),
        (POOL.to_owned() + "reset-order = []", "p:4:15", "no reset would be left"),
        (POOL.to_owned() + "scrub = {}", "p:4:9", "has no 'command'"),
        (POOL.to_owned() + "scrub = { command = [] }", "p:4:9", "by its absolute path"),
        (POOL.to_owned() + "scrub = { command = ['wipe'] }", "p:4:9", "by its absolute path"),
        (
            POOL.to_owned() + "scrub = { command = ['/a'], driver = '../a' }",
            "p:4:38",
            "no name of a driver",
        ),
        (
            POOL.to_owned() + "reset = 'none'\nreset-order = ['flr']",
            "p:5:1",
            "'reset' says that there are none",
        ),
        (POOL.to_owned() + "vfs = 2\nscrub = 'nvme'", "p:5:1", "virtual functions share"),
        (POOL.replace("on-lease", "host") + "scrub = 'none'", "p:4:1", "is the host's"),
        (POOL.replace("on-lease", "host") + "reset = 'none'", "p:4:1", "is the host's"),
        ("pool.a = 1".into(), "p:1:10", "a pool is a table"),
        ("[pool.a\n".into(), "p:1:8", "toml.io"),
    ];
    for (text, place, why) in cases {
        let wrong = wrong(&text);
        let one = wrong.iter().any(|line| line.starts_with(place) && line.contains(why));
        assert!(one, "{text}: {wrong:?}");
    }
    let twice = Policy::parse(&[source("a", POOL), source("b", POOL)]).unwrap_err().to_string();
    assert!(twice.contains("b:1:7: pool 'gpus' is described at a:1:7 too"), "{twice}");
    let limits = [source("a", "boot.limit = 1"), source("b", "boot.limit = 2")];
    assert!(Policy::parse(&limits).unwrap_err().to_string().contains("given in a too"));
}

#[test]
fn all_faults_are_told_at_once() {
    let text = "boot.limt = 1\n[pool.a]\nmode = 'x'\nselect = [{ vendor = 'y' }]\n";
    assert_eq!(wrong(text).len(), 3, "{:?}", wrong(text));
}

#[test]
fn every_key_is_read() {
    // A key that a table names and the reader forgets would take anything.
    for section in keys::ALL {
        for key in section.keys {
            let odd = match key.kind {
                keys::Kind::Flag => "'x'",
                _ => "true",
            };
            let line = format!("{} = {odd}\n", key.name);
            let text = match section.title {
                "file" => line,
                "[boot]" => format!("[boot]\n{line}"),
                "[pool.NAME]" => format!("[pool.a]\n{line}"),
                "[pool.NAME.scrub]" => {
                    let rest = if key.name == "command" { "" } else { "command = ['/a']\n" };
                    format!("[pool.a.scrub]\n{rest}{line}")
                }
                "selector" => format!("[pool.a]\nselect = [{{ {} }}]\n", line.trim()),
                _ => format!("[pool.a]\nvfs = 1\n[pool.a.shape]\n{line}"),
            };
            let said = wrong(&text).join("\n");
            assert!(said.contains(&format!("'{}' takes", key.name)), "{text}: {said}");
        }
    }
}
