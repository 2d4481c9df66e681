//! `docs/dbus.md` is written from the contract: this test fails when they differ, and rewrites the
//! document when `REGENERATE=1` is set.

use std::fmt::Write;
use std::path::Path;

use libvfio::error::ErrorKind;
use zbus_xml::{Annotation, Arg, ArgDirection, Interface, Node};

const CONTRACT: &[u8] = include_bytes!("../../systemd/org.vfiod1.xml");

const HEAD: &str = "\
<!-- Written from systemd/org.vfiod1.xml; see CONTRIBUTING.md. -->
# D-Bus interface

Name `org.vfiod1` on the system bus, started on the first call. `/org/vfiod1` is also an
`org.freedesktop.DBus.ObjectManager`: devices, groups and leases are objects below it, with
properties and `PropertiesChanged`.

Everyday calls are short enough to type:

```console
# busctl call org.vfiod1 /org/vfiod1 org.vfiod1.Manager Attach 'assa{sv}' 1 0000:03:00.0 alice 0
# busctl call org.vfiod1 /org/vfiod1 org.vfiod1.Manager Release 'sa{sv}' 0000:03:00.0 0
```

With options, here the virtual machine that `Release` can name later:

```console
# busctl call org.vfiod1 /org/vfiod1 org.vfiod1.Manager Attach 'assa{sv}' 1 gpu alice 1 vm s web-1
```

Records are dictionaries `a{sv}`; their keys are in [vfioctl-json.md](vfioctl-json.md). A key that is
absent is unknown or does not apply, and later versions may add keys. Names of tenants and virtual
machines have 1 to 64 bytes: letters, digits and `. _ : @ + -`, beginning with a letter or digit.

Root may ask without a bus, which is faster, and `vfioctl` does: at `/run/vfiod/private` the Manager
answers, without signals, to whoever the kernel says is root, and so does each lease made over that
connection. What ends with a connection is for the bus.
";

#[test]
fn the_document_is_what_the_contract_says() {
    let node = Node::from_reader(CONTRACT).unwrap();
    let mut text = HEAD.to_owned();
    for interface in node.interfaces() {
        describe(&mut text, interface).unwrap();
    }
    errors(&mut text).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/dbus.md");
    if std::env::var_os("REGENERATE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(there == text, "run REGENERATE=1 cargo test -p vfiod --test dbus_doc");
}

fn describe(text: &mut String, interface: &Interface<'_>) -> std::fmt::Result {
    writeln!(text, "\n## `{}`\n", interface.name())?;
    writeln!(text, "{}", words(interface.annotations()).expect("an interface without words"))?;
    for method in interface.methods() {
        let given = arguments(method.args(), |d| d != Some(ArgDirection::Out));
        let answer = arguments(method.args(), |d| d == Some(ArgDirection::Out));
        let arrow = if answer.is_empty() { "" } else { " → " };
        writeln!(text, "\n### `{}`({given}){arrow}{answer}\n", method.name())?;
        writeln!(text, "{}", words(method.annotations()).expect("a method without words"))?;
    }
    for signal in interface.signals() {
        let told = arguments(signal.args(), |_| true);
        writeln!(text, "\n### signal `{}`({told})\n", signal.name())?;
        writeln!(text, "{}", words(signal.annotations()).expect("a signal without words"))?;
    }
    if interface.properties().next().is_some() {
        writeln!(text, "\n| property | type | |\n|---|---|---|")?;
    }
    for property in interface.properties() {
        let words = words(property.annotations()).unwrap_or_default();
        writeln!(text, "| `{}` | `{}` | {words} |", property.name(), property.ty())?;
    }
    Ok(())
}

/// The annotation that gdbus-codegen reads too.
fn words<'a>(annotations: impl IntoIterator<Item = &'a Annotation<'a>>) -> Option<&'a str> {
    let all = annotations.into_iter();
    all.filter(|a| a.name() == "org.gtk.GDBus.DocString").map(Annotation::value).next()
}

fn arguments(args: &[Arg<'_>], wanted: impl Fn(Option<ArgDirection>) -> bool) -> String {
    let shown = args.iter().filter(|a| wanted(a.direction()));
    let shown = shown.map(|a| format!("{} `{}`", a.name().unwrap_or("?"), a.ty()));
    shown.collect::<Vec<_>>().join(", ")
}

fn errors(text: &mut String) -> std::fmt::Result {
    writeln!(text, "\n## Errors\n")?;
    writeln!(
        text,
        "The message says what, why and what to do. `vfioctl` exits with the status.\n"
    )?;
    writeln!(text, "| name | status |\n|---|---|")?;
    for kind in ErrorKind::ALL {
        writeln!(text, "| `org.vfiod1.Error.{}` | {} |", kind.name(), kind.exit_status())?;
    }
    Ok(())
}
