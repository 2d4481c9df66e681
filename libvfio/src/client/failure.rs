//! How a call fails: a kind and a text that says what, why and what to do.

use std::fmt;

use zbus::message::{Header, Message};
use zbus::names::ErrorName;

use crate::error::{Error, ErrorKind};
use crate::plan::Refusal;

const PREFIX: &str = "org.vfiod1.Error.";

/// A call that failed.
#[derive(Debug)]
pub enum Failure {
    /// The daemon said no.
    Daemon {
        /// The kind of failure, from the error's name.
        kind: ErrorKind,
        /// What, why and what to do.
        message: String,
    },
    /// The daemon was not reached, or the bus said no.
    Bus(zbus::Error),
}

impl Failure {
    /// A failure of the daemon.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Daemon { kind, message: message.into() }
    }

    /// The kind, if the daemon gave one.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Daemon { kind, .. } => Some(*kind),
            Self::Bus(_) => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon { message, .. } => f.write_str(message),
            Self::Bus(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.kind(), refusal.to_string())
    }
}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        if let zbus::Error::MethodError(name, message, _) = &error {
            let kind = name.as_str().strip_prefix(PREFIX).and_then(ErrorKind::from_name);
            if let Some(kind) = kind {
                return Self::new(kind, message.clone().unwrap_or_default());
            }
        }
        Self::Bus(error)
    }
}

impl zbus::DBusError for Failure {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(self.description().unwrap_or_default(),))
    }

    fn name(&self) -> ErrorName<'_> {
        let kind = self.kind().unwrap_or(ErrorKind::Internal);
        ErrorName::try_from(format!("{PREFIX}{}", kind.name()))
            .unwrap_or_else(|_| ErrorName::from_static_str_unchecked("org.vfiod1.Error.Internal"))
    }

    fn description(&self) -> Option<&str> {
        match self {
            Self::Daemon { message, .. } => Some(message),
            Self::Bus(_) => Some("the bus failed while the call was answered"),
        }
    }
}
