//! How a command ends when it does not end well: one message and one exit status.
//! Prints to standard error; reads nothing.

use std::fmt;
use std::io;
use std::process::ExitCode;

use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use serde_json::json;
use zbus::fdo;

/// The exit status when nobody can be asked (`EX_UNAVAILABLE`, sysexits.h).
pub(crate) const UNAVAILABLE: u8 = 69;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// vfiod said no, or its answer made no sense.
    Refused { kind: ErrorKind, message: String },
    /// vfiod or the bus cannot be reached.
    Unavailable(String),
    /// The answer could not be written.
    Output(io::Error),
}

impl Trouble {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Refused { kind, message: message.into() }
    }

    /// The bus itself was not reached.
    pub(crate) fn no_bus(error: &zbus::Error) -> Self {
        Self::Unavailable(format!("cannot reach the bus: {} (is dbus running?)", brief(error)))
    }

    /// Tells of it on standard error: in words, or as an object.
    pub(crate) fn report(&self, json: bool) {
        let kind = match self {
            Self::Refused { kind, .. } => kind.name(),
            Self::Unavailable(_) => "Unavailable",
            // Whoever read the answer has had enough of it.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
            Self::Output(_) => ErrorKind::Internal.name(),
        };
        report(kind, &self.to_string(), json);
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Refused { kind, .. } => kind.exit_status().into(),
            Self::Unavailable(_) => UNAVAILABLE.into(),
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Self::Output(_) => ErrorKind::Internal.exit_status().into(),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { message, .. } | Self::Unavailable(message) => f.write_str(message),
            Self::Output(error) => write!(f, "cannot write: {error}"),
        }
    }
}

/// Prints a failure to standard error.
pub(crate) fn report(kind: &str, message: &str, json: bool) {
    if json {
        anstream::eprintln!("{}", json!({"error": {"kind": kind, "message": message}}));
    } else {
        let style = crate::table::BAD;
        anstream::eprintln!("{style}error:{style:#} {}", message.replace('\n', "\n       "));
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Daemon { kind, message } => Self::Refused { kind, message },
            Failure::Bus(error) => from_bus(&error),
        }
    }
}

impl From<zbus::Error> for Trouble {
    fn from(error: zbus::Error) -> Self {
        Failure::from(error).into()
    }
}

fn from_bus(error: &zbus::Error) -> Trouble {
    match error {
        zbus::Error::FDO(cause) => from_bus_daemon(cause),
        // The bus has systemd start the daemon, and hands its error on.
        zbus::Error::MethodError(name, ..) if name.starts_with("org.freedesktop.systemd1.") => {
            not_started(&brief(error))
        }
        zbus::Error::InputOutput(_) => gone(),
        _ => Trouble::new(ErrorKind::Internal, not_understood(&brief(error))),
    }
}

fn from_bus_daemon(error: &fdo::Error) -> Trouble {
    use fdo::Error as E;
    match error {
        E::ServiceUnknown(_) | E::NameHasNoOwner(_) => {
            Trouble::Unavailable("vfiod is not running (systemctl status vfiod)".into())
        }
        E::NoReply(_) | E::Disconnected(_) => gone(),
        E::TimedOut(why)
        | E::Timeout(why)
        | E::Failed(why)
        | E::NoMemory(why)
        | E::LimitsExceeded(why)
        | E::SpawnExecFailed(why)
        | E::SpawnForkFailed(why)
        | E::SpawnChildExited(why)
        | E::SpawnChildSignaled(why)
        | E::SpawnFailed(why)
        | E::SpawnFailedToSetup(why)
        | E::SpawnConfigInvalid(why)
        | E::SpawnServiceNotValid(why)
        | E::SpawnServiceNotFound(why)
        | E::SpawnPermissionsInvalid(why)
        | E::SpawnFileInvalid(why)
        | E::SpawnNoMemory(why) => not_started(why),
        // The bus's own text is about matched rules and messages.
        E::AccessDenied(_) => Trouble::new(
            ErrorKind::NotAuthorized,
            "the bus does not let this user talk to vfiod; run it as root, or allow it in the \
             D-Bus policy of org.vfiod1",
        ),
        other => Trouble::new(ErrorKind::Internal, not_understood(&other.to_string())),
    }
}

fn not_started(why: &str) -> Trouble {
    Trouble::Unavailable(format!("vfiod does not start: {why} (systemctl status vfiod)"))
}

fn gone() -> Trouble {
    Trouble::Unavailable(
        "vfiod went away before it answered (systemctl status vfiod); look before trying again"
            .into(),
    )
}

fn not_understood(why: &str) -> String {
    format!(
        "vfiod and vfioctl do not understand each other: {why} (are they of one version? \
         systemctl restart vfiod)"
    )
}

/// An error on one line.
fn brief(error: &zbus::Error) -> String {
    match error {
        zbus::Error::MethodError(_, Some(message), _) => message.clone(),
        other => other.to_string(),
    }
    .replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use zbus::Message;

    use super::*;

    fn of(error: fdo::Error) -> Trouble {
        zbus::Error::from(error).into()
    }

    /// An error as it comes over the bus.
    fn replied(name: &str, message: &str) -> Trouble {
        let call = Message::method_call("/", "A").build(&()).unwrap();
        let header = call.header();
        Message::error(&header, name).build(&(message,)).map(zbus::Error::from).unwrap().into()
    }

    #[test]
    fn what_the_daemon_says_is_passed_on_with_its_kind() {
        let Trouble::Refused { kind, message } = replied("org.vfiod1.Error.NotFound", "no\nsuch")
        else {
            panic!("it answered");
        };
        assert_eq!((kind, message.as_str()), (ErrorKind::NotFound, "no\nsuch"));
        let masked = replied("org.freedesktop.systemd1.UnitMasked", "Unit is masked.");
        assert!(matches!(masked, Trouble::Unavailable(text) if text.contains("masked")));
    }

    #[test]
    fn who_cannot_be_asked_is_unavailable() {
        for error in [
            fdo::Error::ServiceUnknown("x".into()),
            fdo::Error::NoReply("x".into()),
            fdo::Error::SpawnExecFailed("x".into()),
        ] {
            let trouble = of(error);
            assert!(matches!(&trouble, Trouble::Unavailable(text) if text.contains("systemctl")));
            assert_eq!(trouble.exit_code(), ExitCode::from(69));
        }
    }

    #[test]
    fn the_bus_saying_no_is_like_polkit_saying_no() {
        let trouble = of(fdo::Error::AccessDenied("rule".into()));
        assert_eq!(trouble.exit_code(), ExitCode::from(ErrorKind::NotAuthorized.exit_status()));
    }

    #[test]
    fn an_old_daemon_is_named_as_such() {
        let Trouble::Refused { kind, message } = of(fdo::Error::UnknownMethod("no".into())) else {
            panic!("it was there to answer");
        };
        assert_eq!(kind, ErrorKind::Internal);
        assert!(message.contains("restart vfiod"), "{message}");
    }

    #[test]
    fn a_reader_who_left_is_no_failure() {
        let trouble = Trouble::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(trouble.exit_code(), ExitCode::SUCCESS);
    }
}
