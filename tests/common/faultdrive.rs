//! A drive that fails where a test says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use raidtape::error::{Error, ErrorKind, Result};
use raidtape::tape::drive::{Access, BlockSize, Drive, Moved, Read, State, Why, Wrote};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The tape cannot be read or written there.
    Medium,
    /// The drive is reset: it has lost its place.
    Reset,
    /// The drive is reset, and another tape is in it then: `T1` beside it.
    Swap,
    /// Writes meet this; everything else goes on.
    Refused(Why),
    /// The tape can only be appended to, and the drive does not say so.
    HiddenWorm,
    /// The drive takes no blocks that are longer.
    Longer(usize),
    /// The program is killed: what is not safe is lost, and nothing is done any more.
    Stop,
}

/// What goes wrong when: from which operation on, counted from 1, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub trouble: Trouble,
    pub at: u64,
    pub for_ever: bool,
}

#[derive(Default)]
struct Told {
    operations: u64,
    hits: u64,
}

/// What is known of a drive from outside, also when it is gone.
#[derive(Clone, Default)]
pub struct Counter(Arc<Mutex<Told>>);

impl Counter {
    /// Operations so far: reads, writes, motions, closing.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// How often something has gone wrong.
    pub fn hits(&self) -> u64 {
        self.0.lock().hits
    }
}

/// The drive. On an image; its bytes at the moment of a stop are put back when it is dropped.
pub struct FaultDrive {
    inner: Option<Box<dyn Drive>>,
    path: PathBuf,
    plan: Option<Plan>,
    counter: Counter,
    is_lost: bool,
    stopped: Option<Vec<u8>>,
}

impl FaultDrive {
    /// Opens an image, or a drive that is a directory with one.
    pub fn open(path: &Path, plan: Option<Plan>) -> (Box<dyn Drive>, Counter) {
        let counter = Counter::default();
        let inner = Some(raidtape::tape::open(path, Access::Write).unwrap());
        let path = if path.is_dir() { path.join("loaded") } else { path.to_path_buf() };
        // The link goes when the tape is given out.
        let path = path.canonicalize().unwrap_or(path);
        let (plan, told) = (plan, counter.clone());
        let drive = FaultDrive { inner, path, plan, counter: told, is_lost: false, stopped: None };
        (Box::new(drive), counter)
    }

    /// Counts an operation. What it meets, if anything, and if it is refused for that.
    fn ask(&mut self, is_refused: fn(Why) -> bool) -> Result<Option<Why>> {
        let mut told = self.counter.0.lock();
        told.operations += 1;
        let now = told.operations;
        let due = |it: &&Plan| it.at == now || it.for_ever && it.at < now;
        let stop = || Error::new(ErrorKind::Interrupted, "this program was killed");
        if self.stopped.is_some() {
            return Err(stop());
        }
        let Some(trouble) = self.plan.as_ref().filter(due).map(|it| it.trouble) else {
            return Ok(None);
        };
        match trouble {
            Trouble::Refused(why) if !is_refused(why) => return Ok(None),
            Trouble::HiddenWorm | Trouble::Longer(_) => return Ok(None),
            _ => {}
        }
        told.hits += 1;
        drop(told);
        match trouble {
            Trouble::HiddenWorm | Trouble::Longer(_) => Ok(None),
            Trouble::Refused(why) => Ok(Some(why)),
            Trouble::Medium => Err(Error::new(ErrorKind::Io, "an injected error of the medium")),
            Trouble::Reset => {
                self.is_lost = true;
                Err(Error::new(ErrorKind::Io, "an injected reset: the drive has lost its place"))
            }
            Trouble::Swap => {
                self.is_lost = true;
                self.inner = Some(self.next_tape());
                Err(Error::new(ErrorKind::Io, "an injected reset, and another tape"))
            }
            Trouble::Stop => {
                self.stopped = Some(fs::read(&self.path).unwrap());
                Err(stop())
            }
        }
    }

    /// The drive with the tape `T1` beside the one that is in it.
    fn next_tape(&mut self) -> Box<dyn Drive> {
        self.inner = None;
        let real = self.path.canonicalize().unwrap();
        raidtape::tape::open(&real.with_file_name("T1.tap"), Access::Write).unwrap()
    }

    fn inner(&mut self) -> &mut dyn Drive {
        self.inner.as_deref_mut().unwrap()
    }

    fn is_worm_hidden(&self) -> bool {
        self.plan.is_some_and(|it| it.trouble == Trouble::HiddenWorm)
    }

    fn placed(&self) -> Result<()> {
        if self.is_lost {
            return Err(Error::new(ErrorKind::Io, "the drive has lost its place"));
        }
        Ok(())
    }
}

impl Drop for FaultDrive {
    fn drop(&mut self) {
        self.inner = None;
        if let Some(bytes) = self.stopped.take() {
            fs::write(&self.path, bytes).unwrap();
        }
    }
}

impl Drive for FaultDrive {
    fn state(&mut self) -> Result<State> {
        let (lost, is_hidden) = (self.is_lost, self.is_worm_hidden());
        let state = self.inner().state()?;
        let worm = state.worm.filter(|_| !is_hidden);
        Ok(State { lost, worm, ..state })
    }

    fn set_block_size(&mut self, size: BlockSize) -> Result<()> {
        self.inner().set_block_size(size)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<Read> {
        self.placed()?;
        self.ask(|_| false)?;
        self.inner().read(buffer)
    }

    fn write(&mut self, block: &[u8]) -> Result<Wrote> {
        self.placed()?;
        if let Some(why) = self.ask(|_| true)? {
            return Ok(Wrote::NotWritten(why));
        }
        if let Some(Trouble::Longer(most)) = self.plan.map(|it| it.trouble)
            && block.len() > most
        {
            self.counter.0.lock().hits += 1;
            return Err(Error::usage("the drive takes no block of this length"));
        }
        match self.inner().write(block)? {
            Wrote::NotWritten(Why::Worm) if self.is_worm_hidden() => {
                self.counter.0.lock().hits += 1;
                Err(Error::new(ErrorKind::Io, "the drive does not say what it is"))
            }
            wrote => Ok(wrote),
        }
    }

    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        self.placed()?;
        // There is room for those when the end is near.
        match self.ask(|it| it != Why::EarlyWarning)? {
            Some(why) => Ok(Wrote::NotWritten(why)),
            None => self.inner().write_filemarks(count),
        }
    }

    fn position(&mut self) -> Result<u64> {
        self.placed()?;
        self.inner().position()
    }

    fn locate(&mut self, position: u64) -> Result<Moved> {
        self.ask(|_| false)?;
        self.is_lost = false;
        self.inner().locate(position)
    }

    fn rewind(&mut self) -> Result<()> {
        self.ask(|_| false)?;
        self.is_lost = false;
        self.inner().rewind()
    }

    fn to_end_of_data(&mut self) -> Result<()> {
        self.ask(|_| false)?;
        self.is_lost = false;
        self.inner().to_end_of_data()
    }

    fn space_files(&mut self, count: i64) -> Result<Moved> {
        self.placed()?;
        self.ask(|_| false)?;
        self.inner().space_files(count)
    }

    fn unload(&mut self) -> Result<()> {
        self.ask(|_| false)?;
        self.inner().unload()
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        let asked = self.ask(|_| false);
        if self.stopped.is_some() {
            return asked.map(|_| ());
        }
        let closed = self.inner.take().map_or(Ok(()), |it| it.close());
        asked.and(closed)
    }
}
