//! Who may do what: root may, others are for polkit to decide. Talks to the bus daemon and to
//! polkit; anything unclear is a no.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::policy::Lessees;
use nix::unistd::{Group, Uid, User, getgrouplist};
use tracing::{info, warn};
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::names::BusName;
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

/// An action that needs permission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take devices from the host for a tenant.
    Attach,
    /// The same from a pool of the policy that names the caller.
    AttachFromPool,
    /// Give devices back to the host.
    Release,
    /// Say whether a device is trusted.
    Quarantine,
    /// Change how many virtual functions there are.
    VirtualFunctions,
    /// Read the policy anew, or do what it says.
    Policy,
    /// Take what the host cannot live without.
    OverrideProtection,
    /// Open devices that somebody else has leased.
    Open,
    /// Lock as much memory as a guest has.
    LockMemory,
}

impl Action {
    /// Its id in `org.vfiod1.policy`.
    pub fn id(self) -> &'static str {
        match self {
            Self::Attach => "org.vfiod1.attach",
            Self::AttachFromPool => "org.vfiod1.attach-from-pool",
            Self::Release => "org.vfiod1.release",
            Self::Quarantine => "org.vfiod1.quarantine",
            Self::VirtualFunctions => "org.vfiod1.virtual-functions",
            Self::Policy => "org.vfiod1.policy",
            Self::OverrideProtection => "org.vfiod1.override-protection",
            Self::Open => "org.vfiod1.open",
            Self::LockMemory => "org.vfiod1.lock-memory",
        }
    }
}

/// Whether a pool names a user, or a group of it. Asks the host's user database, which may take long.
pub fn is_named(user: u32, lessees: &Lessees) -> bool {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(user)) else { return false };
    if lessees.users.contains(&user.name) {
        return true;
    }
    let name = CString::new(user.name).unwrap_or_default();
    let own = getgrouplist(&name, user.gid).unwrap_or_default();
    let group = |name: &String| Group::from_name(name).ok().flatten().map(|group| group.gid);
    lessees.groups.iter().filter_map(group).any(|group| own.contains(&group))
}

/// Most callers remembered at a time.
const MOST_REMEMBERED: usize = 1024;

/// Decides on calls that come over one connection.
#[derive(Debug)]
pub struct Authority {
    connection: zbus::Connection,
    /// Who may do everything, beside root: whoever runs a simulation, in it.
    owner: u32,
    /// User ids of callers by unique name. The bus never reuses a unique name.
    users: Mutex<HashMap<String, u32>>,
    /// The one caller there is, on a connection without a bus.
    peer: Option<u32>,
}

impl Authority {
    /// For calls over `connection`, where root and `owner` may do everything.
    pub fn new(connection: zbus::Connection, owner: u32) -> Self {
        Self { connection, owner, users: Mutex::default(), peer: None }
    }

    /// For calls over a connection without a bus, all of which this user makes.
    #[must_use]
    pub fn for_peer(&self, user: u32) -> Self {
        let (connection, owner) = (self.connection.clone(), self.owner);
        Self { connection, owner, users: Mutex::default(), peer: Some(user) }
    }

    /// Whether callers have names that the bus has given them: without one they may say any.
    pub fn on_bus(&self) -> Result<(), Failure> {
        let why = "only the bus tells when whoever calls has gone; call over the bus";
        let refused = Failure::new(ErrorKind::InvalidArgument, why);
        if self.peer.is_none() { Ok(()) } else { Err(refused) }
    }

    /// Whether a user may do everything.
    pub fn trusts(&self, user: u32) -> bool {
        user == 0 || user == self.owner
    }

    /// The user id of the caller if it may do `action`, else why not. `details` are for polkit's
    /// rules to decide on.
    pub async fn check(
        &self,
        header: &Header<'_>,
        action: Action,
        details: &HashMap<&str, &str>,
    ) -> Result<u32, Failure> {
        let user = self.user(header).await?;
        if self.trusts(user) || self.polkit_allows(header, action, details).await {
            return Ok(user);
        }
        info!(user, action = action.id(), ?details, "refused by polkit");
        Err(Failure::new(
            ErrorKind::NotAuthorized,
            format!(
                "user {user} may not do this ({}); run it as root, or let a polkit rule allow it",
                action.id()
            ),
        ))
    }

    /// The user id of the caller, and whether it may do everything.
    pub async fn caller(&self, header: &Header<'_>) -> Result<(u32, bool), Failure> {
        let user = self.user(header).await?;
        Ok((user, self.trusts(user)))
    }

    /// Like [`check`](Self::check), but `owner` may, too.
    pub async fn check_owner(
        &self,
        header: &Header<'_>,
        owner: u32,
        action: Action,
        details: &HashMap<&str, &str>,
    ) -> Result<u32, Failure> {
        match self.user(header).await? {
            user if user == owner => Ok(user),
            _ => self.check(header, action, details).await,
        }
    }

    /// The process that calls.
    pub async fn process(&self, header: &Header<'_>) -> Result<u32, Failure> {
        let unknown = || {
            let why = "the bus does not say which process calls; call again";
            Failure::new(ErrorKind::NotAuthorized, why)
        };
        self.on_bus()?;
        let sender = header.sender().ok_or_else(unknown)?;
        let bus = DBusProxy::new(&self.connection).await.map_err(|_| unknown())?;
        let process = bus.get_connection_unix_process_id(BusName::from(sender.clone()));
        process.await.map_err(|_| unknown())
    }

    /// The user that calls.
    pub async fn user(&self, header: &Header<'_>) -> Result<u32, Failure> {
        if let Some(user) = self.peer {
            return Ok(user);
        }
        let unknown =
            || Failure::new(ErrorKind::NotAuthorized, "the bus does not say who calls; call again");
        let sender = header.sender().ok_or_else(unknown)?;
        let known =
            self.users.lock().unwrap_or_else(PoisonError::into_inner).get(sender.as_str()).copied();
        if let Some(user) = known {
            return Ok(user);
        }
        let bus = DBusProxy::new(&self.connection).await.map_err(|_| unknown())?;
        let user = bus
            .get_connection_unix_user(BusName::from(sender.clone()))
            .await
            .map_err(|_| unknown())?;
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.len() >= MOST_REMEMBERED {
            users.clear();
        }
        users.insert(sender.to_string(), user);
        Ok(user)
    }

    async fn polkit_allows(
        &self,
        header: &Header<'_>,
        action: Action,
        details: &HashMap<&str, &str>,
    ) -> bool {
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        let flags = if interactive {
            CheckAuthorizationFlags::ALLOW_USER_INTERACTION
        } else {
            CheckAuthorizationFlags::empty()
        };
        let asked = async {
            let subject = Subject::new_for_message_header(header)?;
            let polkit = AuthorityProxy::new(&self.connection).await?;
            let answer =
                polkit.check_authorization(&subject, action.id(), details, flags, "").await?;
            anyhow::Ok(answer.is_authorized)
        };
        asked.await.unwrap_or_else(|error| {
            warn!(%error, "polkit did not answer, which is taken as a no");
            false
        })
    }
}
