//! Devices that are not trusted, and the record of what happened. Changes no device and no lease:
//! a quarantine keeps a device from its next lease.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use libvfio::address::PciAddress;
use libvfio::client::{CheckedRecord, Failure, QuarantineRecord};
use libvfio::error::ErrorKind;
use tracing::{error, info, warn};

use super::ending::is_same;
use super::{Broker, Change, Data, Property};
use crate::cleaned::Cleaned;
use crate::durable::SetAside;
use crate::history::{Audit, Entry, Event};
use crate::lease::Lease;
use crate::quarantine::{self, Distrusted};
use crate::request::{HistoryOptions, check_reason};

impl Data {
    /// The functions that are not trusted, and why, but for what `tenant` may have all the same.
    pub(super) fn quarantined(&self, tenant: Option<&str>) -> BTreeMap<PciAddress, String> {
        quarantine::reasons(&self.distrusted, &self.inventory, tenant)
    }

    /// Why a function is not trusted, if so.
    pub(super) fn quarantine_of(&self, address: PciAddress) -> Option<String> {
        quarantine::reason(&self.distrusted, &self.inventory, self.inventory.get(address)?)
    }
}

impl Broker {
    /// Every device that is not trusted, in the order in which that was decided.
    pub fn quarantines(&self) -> Vec<QuarantineRecord> {
        let data = self.data();
        data.distrusted.iter().map(|entry| entry.record(&data.inventory)).collect()
    }

    /// Why a function is not trusted, if so.
    pub fn quarantine_of(&self, address: PciAddress) -> Option<String> {
        self.data().quarantine_of(address)
    }

    /// Keeps the device that `name` means from leases to come, for `reason`, on behalf of user
    /// `by`. A lease that has it goes on.
    pub fn quarantine(&self, name: &str, reason: &str, by: u32) -> Result<PciAddress, Failure> {
        check_reason(reason)?;
        let address = self.resolve(name)?;
        self.distrust(&[address], reason, Some(by), None)?;
        Ok(address)
    }

    /// Keeps devices from leases to come because the daemon no longer trusts them. What cannot be
    /// written holds until the daemon ends.
    pub fn quarantine_devices(
        &self,
        addresses: impl IntoIterator<Item = PciAddress>,
        reason: &str,
    ) {
        let addresses: Vec<PciAddress> = addresses.into_iter().collect();
        self.keep_from_all(&addresses, reason, None);
    }

    /// Keeps what could not be reset after a tenant from all others.
    pub(super) fn keep_for_tenant(&self, lease: &Lease) {
        let left: Vec<PciAddress> = lease.unresettable().collect();
        if !left.is_empty() {
            let tenant = &lease.tenant;
            let reason = format!(
                "it cannot be reset, so what tenant '{tenant}' left in it is still there; only \
                 '{tenant}' may have it"
            );
            self.keep_from_all(&left, &reason, Some(tenant));
        }
    }

    fn keep_from_all(&self, addresses: &[PciAddress], reason: &str, but_for: Option<&str>) {
        if let Err(failure) = self.distrust(addresses, reason, None, but_for) {
            error!(%failure, devices = ?addresses, "a quarantine will not outlive the daemon");
        }
    }

    fn distrust(
        &self,
        addresses: &[PciAddress],
        reason: &str,
        by: Option<u32>,
        but_for: Option<&str>,
    ) -> Result<(), Failure> {
        let mut quarantine = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
        let (devices, news) = {
            let mut data = self.data();
            let inventory = data.inventory.clone();
            let mut news = Vec::new();
            for function in addresses.iter().filter_map(|address| inventory.get(*address)) {
                let new = Distrusted::new(&inventory, function, reason, by);
                let new = Distrusted { but_for: but_for.map(str::to_owned), ..new };
                let here = |e: &&mut Distrusted| {
                    e.find(&inventory).is_some_and(|f| f.address == function.address)
                };
                match data.distrusted.iter_mut().find(here) {
                    Some(known) if (known.reason.as_str(), known.by) == (reason, by) => continue,
                    // Who may have it is not to be more than before.
                    Some(known) if but_for.is_some() && known.but_for.is_none() => continue,
                    Some(known) => *known = Distrusted { since: known.since, ..new },
                    None => data.distrusted.push(new),
                }
                news.push((function.address, data.holder(function.address).map(|l| l.id.clone())));
            }
            (data.distrusted.clone(), news)
        };
        if news.is_empty() && !quarantine.is_unwritten() {
            return Ok(());
        }
        let written = quarantine.write(&devices).map_err(unwritten);
        // On record in the order in which they came, so before the next one may begin.
        self.record_quarantined(&news, reason, by, but_for);
        drop(quarantine);
        let news: Vec<PciAddress> = news.into_iter().map(|(device, _)| device).collect();
        if !news.is_empty() {
            warn!(devices = ?news, reason, by, "quarantined");
            self.tell_quarantine_changed(&news);
        }
        written
    }

    /// An entry for each lease that has some of the devices, which was made before and keeps them.
    fn record_quarantined(
        &self,
        news: &[(PciAddress, Option<String>)],
        reason: &str,
        by: Option<u32>,
        but_for: Option<&str>,
    ) {
        let mut of: BTreeMap<&Option<String>, Vec<PciAddress>> = BTreeMap::new();
        for (device, lease) in news {
            of.entry(lease).or_default().push(*device);
        }
        let text = format!("by {}: {reason}", by.map_or("vfiod".into(), |id| format!("user {id}")));
        for (lease, devices) in of {
            let entry = Entry::now(Event::Quarantined, devices, text.clone());
            let but_for = but_for.map(str::to_owned);
            self.record(&Entry { lease: lease.clone(), but_for, ..entry });
        }
    }

    /// Trusts a device again. Answers whether it was not trusted; a device that is not there is
    /// named by the address it had.
    pub fn clear_quarantine(&self, name: &str, by: u32) -> Result<bool, Failure> {
        let address = match self.resolve(name) {
            Ok(address) => address,
            Err(error) => name.parse().map_err(|_| error)?,
        };
        let mut quarantine = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
        let (kept, cleared): (Vec<Distrusted>, Vec<Distrusted>) = {
            let data = self.data();
            let is_at = |e: &Distrusted| e.find(&data.inventory).map_or(e.address, |f| f.address);
            data.distrusted.iter().cloned().partition(|entry| is_at(entry) != address)
        };
        if cleared.is_empty() {
            return Ok(false);
        }
        quarantine.write(&kept).map_err(unwritten)?;
        let reasons: Vec<&str> = cleared.iter().map(|entry| entry.reason.as_str()).collect();
        let text = format!("by user {by}; it was: {}", reasons.join("; "));
        // On record before anybody can be given it.
        self.record(&Entry::now(Event::Cleared, vec![address], text));
        self.data().distrusted = kept;
        drop(quarantine);
        info!(device = %address, by, "quarantine cleared");
        self.tell_quarantine_changed(&[address]);
        Ok(true)
    }

    fn tell_quarantine_changed(&self, addresses: &[PciAddress]) {
        let inventory = self.inventory();
        for address in addresses.iter().filter(|address| inventory.get(**address).is_some()) {
            self.tell(Change::DeviceChanged(*address, vec![Property::Quarantine]));
        }
    }

    /// The newest things that happened, oldest first.
    pub fn history(&self, options: &HistoryOptions) -> Result<Vec<Entry>, Failure> {
        let device = options.device.as_deref();
        let device = device.map(|name| self.resolve(name).or_else(|e| name.parse().map_err(|_| e)));
        let device = device.transpose()?;
        let wanted = |entry: &Entry| {
            options.lease.as_ref().is_none_or(|id| entry.lease.as_ref() == Some(id))
                && device.is_none_or(|address| entry.devices.contains(&address))
        };
        self.history.read(options.last, wanted).map_err(unread)
    }

    /// Whether that is what was written, and whether by it nobody was given what is not clean, not
    /// trusted or another's.
    pub fn check_history(&self) -> Result<CheckedRecord, Failure> {
        let checked = self.history.check().map_err(unread)?;
        let entries = self.history.read(usize::MAX, |_| true).map_err(unread)?;
        let audit = Audit::of(&entries);
        Ok(CheckedRecord {
            entries: checked.entries,
            first: checked.head.first,
            next: checked.head.next,
            chain: checked.head.chain,
            faults: checked.faults.into_iter().chain(audit.faults().iter().cloned()).collect(),
        })
    }

    /// Puts on record what became of a lease.
    pub(super) fn note(&self, lease: &Lease, event: Event, text: &str) {
        let inventory = self.inventory();
        let gone = |device: PciAddress| {
            let leased = lease.devices.get(&device).map(|found| &found.identity);
            let now = inventory.get(device);
            now.is_none_or(|now| leased.is_some_and(|leased| !now.stuck && !is_same(now, leased)))
        };
        let mut entry = Entry::of(lease, event, text);
        let told = |one: Cleaned| if gone(one.device) { one.of_gone() } else { one };
        entry.cleaned = entry.cleaned.into_iter().map(told).collect();
        self.record(&entry);
    }

    /// Puts on record that files of the daemon were not understood.
    pub(super) fn note_aside(&self, files: &[SetAside]) {
        for SetAside { path, reason } in files {
            error!(path = %path.display(), reason, "a file was set aside");
            let text = format!("{}: {reason}", path.display());
            self.record(&Entry::now(Event::SetAside, Vec::new(), text));
        }
    }

    /// Puts on record that the devices not trusted are not known any more.
    pub(super) fn note_quarantine_lost(&self) {
        let text = "which devices were in quarantine is lost; quarantine them again";
        error!("{text}");
        self.record(&Entry::now(Event::SetAside, Vec::new(), text));
    }

    /// Puts on record, and on disk, what the kernel says of a lease whose newest record is lost.
    pub(super) fn note_caught_up(&self, lease: &Lease) {
        let state = lease.state.name();
        warn!(lease = lease.id, state, "a lease's newest record is lost; by the kernel it is so");
        self.note(
            lease,
            Event::Recovered,
            &format!("its newest record is lost; by the kernel it is {state}"),
        );
        if let Err(error) = self.walker.ledger.write(lease) {
            warn!(lease = lease.id, %error, "cannot write the lease ledger");
        }
    }

    /// A record that cannot be written is no reason to stop.
    pub(super) fn record(&self, entry: &Entry) {
        if let Err(error) = self.history.append(entry) {
            warn!(%error, event = entry.event.name(), "cannot write the history");
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn unread(error: std::io::Error) -> Failure {
    Failure::new(ErrorKind::Internal, format!("cannot read the history: {error}"))
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn unwritten(error: std::io::Error) -> Failure {
    Failure::new(
        ErrorKind::Internal,
        format!(
            "cannot write the quarantine, so it may be as before when vfiod starts again: {error}; \
             free space in its state directory (/var/lib/vfiod) and try again"
        ),
    )
}
