//! Many clients, few groups: whoever wins a group has it alone until it gives it back, and the
//! daemon keeps nothing of it. `VFIOD_RACE_SECONDS` says for how long; 30 is the full run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libvfio::client::{Failure, ManagerProxy};
use libvfio::error::ErrorKind;
use vfiod_tests::session::{LONG, Session, Usage};
use vfiod_tests::sim::SCALE;

const CLIENTS: usize = 64;
const GROUPS: usize = 16;
/// No call waits longer for others, whatever the build and the machine.
const SLOWEST: Duration = Duration::from_secs(10);
/// Descriptors that may be there at one moment and not at another: the sockets of idle workers.
const DESCRIPTORS: usize = 16;
/// The same of memory, in KiB: threads that have just ended, and what the allocator keeps.
const MEMORY: usize = 8 << 10;

/// What is raced for, and what came of it.
#[derive(Debug, Default)]
struct Race {
    /// Addresses, one per group, and how many clients believe they have it.
    groups: Vec<(String, AtomicUsize)>,
    wins: AtomicU64,
    losses: AtomicU64,
    /// In microseconds.
    slowest: AtomicU64,
}

impl Race {
    fn timed(&self, since: Instant) {
        let took = u64::try_from(since.elapsed().as_micros()).unwrap();
        self.slowest.fetch_max(took, Ordering::Relaxed);
    }

    /// Attaches and releases as `tenant` until the time is over.
    async fn run(&self, manager: &ManagerProxy<'_>, tenant: &str, seed: u64, end: Instant) {
        let mut dice = seed;
        while Instant::now() < end {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            let (address, holders) = &self.groups[usize::try_from(dice >> 8).unwrap() % GROUPS];
            let asked = Instant::now();
            let attached = manager.attach(&[address], tenant, [].into()).await;
            self.timed(asked);
            match attached {
                Ok((lease, _)) => {
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "{address} has two");
                    self.wins.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1, "{address} has two");
                    let asked = Instant::now();
                    let released = manager.release(&lease, [].into()).await;
                    assert_eq!(released.unwrap(), [lease]);
                    self.timed(asked);
                }
                Err(failure) => {
                    assert_eq!(failure.kind(), Some(ErrorKind::AlreadyLeased), "{failure}");
                    self.losses.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Drivers and overrides of all functions, as the daemon knows them.
async fn drivers(manager: &ManagerProxy<'_>) -> BTreeMap<String, (Option<String>, Option<String>)> {
    let devices = manager.list_devices([].into()).await.unwrap();
    devices.into_iter().map(|d| (d.address, (d.driver, d.driver_override))).collect()
}

/// What the daemon uses once nothing is under way.
async fn at_rest(session: &Session) -> Usage {
    tokio::time::sleep(Duration::from_millis(500)).await;
    session.usage()
}

/// Lets all clients race for a while; says what came of it.
async fn race(race: &Arc<Race>, session: &Session, lasting: Duration) {
    let end = Instant::now() + lasting;
    let mut clients = tokio::task::JoinSet::new();
    for number in 1..=CLIENTS {
        let (race, connection) = (race.clone(), session.connect().await);
        clients.spawn(async move {
            let manager = ManagerProxy::new(&connection).await?;
            let seed = 0x9e37_79b9_7f4a_7c15 ^ (number as u64) << 32;
            race.run(&manager, &format!("tenant-{number}"), seed, end).await;
            Ok::<_, Failure>(())
        });
    }
    let all = async {
        while let Some(client) = clients.join_next().await {
            client.unwrap().unwrap();
        }
    };
    tokio::time::timeout(lasting + LONG, all).await.expect("a client got no answer");
}

/// Of each device, every attachment but the last was followed by a release, and the other way round.
async fn history_alternates(manager: &ManagerProxy<'_>) -> usize {
    let all = [("last", u32::MAX.into())].into();
    let history = manager.list_history(all).await.unwrap();
    let mut last: BTreeMap<&str, &str> = BTreeMap::new();
    for entry in &history {
        let before = last.insert(&entry.devices[0], &entry.event);
        let after = match entry.event.as_str() {
            "attached" => "released",
            "released" => "attached",
            other => panic!("{other}: {entry:?}"),
        };
        assert!(before.is_none_or(|before| before == after), "{before:?}, then {entry:?}");
    }
    history.len()
}

#[tokio::test]
async fn one_client_at_a_time_wins_a_group_and_the_daemon_keeps_nothing_of_it() {
    let seconds = std::env::var("VFIOD_RACE_SECONDS").ok().map(|text| text.parse().unwrap());
    let lasting = Duration::from_secs(seconds.unwrap_or(5));
    let mut session = Session::of_many_users(&SCALE.replace("count = 200", "count = 1"));
    let connection = session.connect().await;
    let manager = ManagerProxy::new(&connection).await.unwrap();
    let devices = manager.list_devices([].into()).await.unwrap();
    let mut groups: Vec<_> = devices.iter().filter(|d| d.physical_function.is_some()).collect();
    groups.dedup_by_key(|device| device.iommu_group);
    let groups = groups.into_iter().take(GROUPS).map(|d| (d.address.clone(), AtomicUsize::new(0)));
    let state = Arc::new(Race { groups: groups.collect(), ..Race::default() });
    assert_eq!(state.groups.len(), GROUPS);
    let before = drivers(&manager).await;

    race(&state, &session, lasting.min(Duration::from_secs(2))).await;
    let warm = at_rest(&session).await;
    for count in [&state.wins, &state.losses, &state.slowest] {
        count.store(0, Ordering::Relaxed);
    }
    let started = Instant::now();
    race(&state, &session, lasting).await;
    let took = started.elapsed();
    let after = at_rest(&session).await;

    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (wins, losses) = (count(&state.wins), count(&state.losses));
    let slowest = Duration::from_micros(count(&state.slowest));
    // Each win is an attachment and a release.
    let rate = u128::from(2 * wins + losses) * 1000 / took.as_millis();
    let leases = u128::from(wins) * 1000 / took.as_millis();
    println!(
        "{rate} calls/s of {CLIENTS} clients: {leases} leases/s of {GROUPS} groups, {losses} \
         refused, the slowest call {slowest:.2?}; {warm:?}, then {after:?}"
    );
    assert!(session.vfiod.runs());
    assert!(wins > 0 && losses > 0);
    assert!(slowest < SLOWEST, "a call took {slowest:?}");
    assert!(manager.list_leases().await.unwrap().is_empty());
    assert_eq!(drivers(&manager).await, before);
    assert!(history_alternates(&manager).await > 0);
    assert!(after.descriptors <= warm.descriptors + DESCRIPTORS, "{warm:?}, then {after:?}");
    assert!(after.memory <= warm.memory + MEMORY, "{warm:?}, then {after:?}");
}
