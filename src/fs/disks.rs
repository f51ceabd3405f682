//! The volumes and their space as they are now, or as they were last seen.
//!
//! A disk that does not answer must not keep a thread of a session. So each volume is looked at by
//! a thread of its own, one at a time, and who asks waits for it a moment, counted from the
//! beginning of the look: of a disk that has stopped only the first to ask waits.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::catalog::Reader;
use crate::error::Result;
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
    last: Option<Found>,
}

/// The disks of a catalog's volumes.
#[derive(Default)]
pub struct Disks {
    /// By the volumes' numbers.
    known: Mutex<HashMap<i64, Looks>>,
    told: Condvar,
}

impl Disks {
    /// All volumes of the catalog.
    pub fn of(self: &Arc<Disks>, snapshots: &Snapshots) -> Result<Vec<Seen>> {
        let configs = snapshots.with_reader(Reader::volumes)?;
        Ok(self.look(configs, look))
    }

    /// Space of the volumes that are present, each file system once.
    pub fn space(self: &Arc<Disks>, snapshots: &Snapshots) -> Result<Space> {
        let mut counted = std::collections::HashSet::new();
        let mut sum = Space::default();
        for Seen { space, dev, .. } in self.of(snapshots)? {
            if let Some(space) = space.filter(|_| counted.insert(dev)) {
                sum.total_bytes += space.total_bytes;
                sum.free_bytes += space.free_bytes;
                sum.total_inodes += space.total_inodes;
                sum.free_inodes += space.free_inodes;
            }
        }
        Ok(sum)
    }

    /// Has `look` look at each volume, unless a look at it is under way.
    fn look(
        self: &Arc<Disks>,
        configs: Vec<VolumeConfig>,
        look: fn(&VolumeConfig) -> Found,
    ) -> Vec<Seen> {
        let mut known = self.known.lock();
        for config in &configs {
            let looks = known.entry(config.number).or_default();
            if looks.begun.is_none() {
                let (disks, config) = (self.clone(), config.clone());
                let work = move || disks.tell(config.number, look(&config));
                // Without a thread it is as if the disk did not answer: asked again next time.
                let thread = std::thread::Builder::new().spawn(work);
                looks.begun = thread.is_ok().then(Instant::now);
            }
        }
        let numbers = configs.iter().map(|it| it.number).collect::<Vec<_>>();
        loop {
            let begun = numbers.iter().filter_map(|it| known.get(it)?.begun);
            let Some(until) = begun.map(|it| it + PATIENCE).filter(|it| *it > Instant::now()).max()
            else {
                break;
            };
            self.told.wait_until(&mut known, until);
        }
        let seen = |config: VolumeConfig| {
            let looks = known.get(&config.number);
            let last = looks.and_then(|it| it.last);
            let answers = last.is_some() && looks.is_some_and(|it| it.begun.is_none());
            let Found { present, space, dev } = last.unwrap_or_default();
            Seen { config, answers, present, space, dev }
        };
        configs.into_iter().map(seen).collect()
    }

    fn tell(&self, volume: i64, found: Found) {
        self.known.lock().insert(volume, Looks { begun: None, last: Some(found) });
        self.told.notify_all();
    }
}

fn look(config: &VolumeConfig) -> Found {
    let Ok(volume) = Volume::open(config.clone()) else { return Found::default() };
    let dev = sys::stat(&config.path).map_or(0, |it| it.dev);
    Found { present: true, space: volume.store.space().ok(), dev }
}
