//! The volumes and their space as they are now, or as they were last seen.
//!
//! A disk that does not answer must not keep a thread of a session. So each volume is looked at by
//! a thread of its own, one at a time, and who asks waits for it a moment, counted from the
//! beginning of the look: of a disk that has stopped only the first to ask waits. Then what was
//! seen before is told, with its age.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::catalog::Reader;
use crate::error::Result;
use crate::job::Bell;
use crate::snapshot::Snapshots;
use crate::sys::{self, Space};
use crate::volume::{Volume, VolumeConfig};

/// How long a look may take until what was seen before is told.
const PATIENCE: Duration = Duration::from_secs(1);

/// A volume of the catalog.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What the catalog says of it.
    pub config: VolumeConfig,
    /// Whether its disk answers. If not, the rest is as it was when it did.
    pub answers: bool,
    /// Whether it lies where it should.
    pub present: bool,
    /// The space of its file system, if it is present.
    pub space: Option<Space>,
    /// The device of that file system: several volumes may share one.
    pub dev: u64,
    /// How old all this is; `None` if the disk has never answered, and nothing is known.
    pub age: Option<Duration>,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    present: bool,
    space: Option<Space>,
    dev: u64,
}

/// The looks at a volume.
#[derive(Default)]
struct Looks {
    /// When the one under way has begun.
    begun: Option<Instant>,
    /// What the last one has found, and when it has ended.
    last: Option<(Found, Instant)>,
}

/// The disks of a catalog's volumes.
#[derive(Default)]
pub struct Disks {
    /// By the volumes' numbers.
    known: Mutex<HashMap<i64, Looks>>,
    told: Condvar,
    bell: OnceLock<Arc<Bell>>,
}

impl Disks {
    /// Has every look ring a bell when it ends, for those who wait elsewhere; only once.
    pub fn ring(&self, bell: &Arc<Bell>) {
        let _ = self.bell.set(bell.clone());
    }

    /// Has all volumes of the catalog looked at, and waits for nothing.
    pub fn begin(self: &Arc<Disks>, snapshots: &Snapshots) -> Result<()> {
        self.begin_at(&snapshots.with_reader(Reader::volumes)?, look);
        Ok(())
    }

    /// Whether no look is under way that is worth waiting for.
    pub fn are_seen(&self) -> bool {
        let is_due = |it: &Looks| it.begun.is_none_or(|begun| begun.elapsed() >= PATIENCE);
        self.known.lock().values().all(is_due)
    }

    /// All volumes of the catalog, as they were last seen.
    pub fn seen(&self, snapshots: &Snapshots) -> Result<Vec<Seen>> {
        let configs = snapshots.with_reader(Reader::volumes)?;
        Ok(seen(&self.known.lock(), configs))
    }

    /// Space of the volumes that are present, each file system once.
    pub fn space(self: &Arc<Disks>, snapshots: &Snapshots) -> Result<Space> {
        let mut counted = std::collections::HashSet::new();
        let mut sum = Space::default();
        let configs = snapshots.with_reader(Reader::volumes)?;
        for Seen { space, dev, .. } in self.look(configs, look) {
            if let Some(space) = space.filter(|_| counted.insert(dev)) {
                sum.total_bytes += space.total_bytes;
                sum.free_bytes += space.free_bytes;
                sum.root_bytes += space.root_bytes;
                sum.total_inodes += space.total_inodes;
                sum.free_inodes += space.free_inodes;
            }
        }
        Ok(sum)
    }

    /// Has `look` look at each volume, unless a look at it is under way.
    fn begin_at(self: &Arc<Disks>, configs: &[VolumeConfig], look: fn(&VolumeConfig) -> Found) {
        let mut known = self.known.lock();
        for config in configs {
            let looks = known.entry(config.number).or_default();
            if looks.begun.is_none() {
                let (disks, config) = (self.clone(), config.clone());
                let work = move || disks.tell(config.number, look(&config));
                // Without a thread it is as if the disk did not answer: asked again next time.
                let thread = std::thread::Builder::new().spawn(work);
                looks.begun = thread.is_ok().then(Instant::now);
            }
        }
    }

    /// The same, and waits.
    fn look(
        self: &Arc<Disks>,
        configs: Vec<VolumeConfig>,
        look: fn(&VolumeConfig) -> Found,
    ) -> Vec<Seen> {
        self.begin_at(&configs, look);
        let mut known = self.known.lock();
        let numbers = configs.iter().map(|it| it.number).collect::<Vec<_>>();
        loop {
            let begun = numbers.iter().filter_map(|it| known.get(it)?.begun);
            let Some(until) = begun.map(|it| it + PATIENCE).filter(|it| *it > Instant::now()).max()
            else {
                break;
            };
            self.told.wait_until(&mut known, until);
        }
        seen(&known, configs)
    }

    fn tell(&self, volume: i64, found: Found) {
        let looks = Looks { begun: None, last: Some((found, Instant::now())) };
        self.known.lock().insert(volume, looks);
        self.told.notify_all();
        if let Some(bell) = self.bell.get() {
            bell.ring();
        }
    }
}

fn seen(known: &HashMap<i64, Looks>, configs: Vec<VolumeConfig>) -> Vec<Seen> {
    let seen = |config: VolumeConfig| {
        let looks = known.get(&config.number);
        let last = looks.and_then(|it| it.last);
        let answers = last.is_some() && looks.is_some_and(|it| it.begun.is_none());
        let Found { present, space, dev } = last.map(|it| it.0).unwrap_or_default();
        let age = last.map(|it| it.1.elapsed());
        Seen { config, answers, present, space, dev, age }
    };
    configs.into_iter().map(seen).collect()
}

fn look(config: &VolumeConfig) -> Found {
    let Ok(volume) = Volume::open(config.clone()) else { return Found::default() };
    let dev = sys::stat(&config.path).map_or(0, |it| it.dev);
    Found { present: true, space: volume.store.space().ok(), dev }
}
