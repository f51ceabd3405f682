//! The one error type of this program.
//!
//! Invariant: a failure carries a complete message and a class, and the class alone decides the
//! exit code, once for each of the two command forms.

use std::io;
use std::path::Path;

use crate::shown::shown;

/// What went wrong, as far as exit codes tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The command line cannot be carried out as written.
    Usage,
    /// The caller may not do this.
    Permission,
    /// The system did not do what it should: no /proc, no program to start.
    System,
    /// The operation itself failed.
    Failed,
    /// A signal ended the wait.
    Interrupted,
    /// The daemon refused, with this exit code of its own.
    Daemon(u8),
}

/// An error ready to be printed.
#[derive(Debug)]
pub struct Failure {
    pub class: Class,
    pub message: String,
}

impl Failure {
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Class::Usage, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Class::Failed, message)
    }

    pub fn system(message: impl Into<String>) -> Self {
        Self::new(Class::System, message)
    }

    /// An operation on a file the user named; lacking permission has a class of its own because
    /// mount(8) gives it another exit code.
    pub fn on_path(doing: &str, path: &Path, error: &io::Error) -> Self {
        let class = match error.kind() {
            io::ErrorKind::PermissionDenied => Class::Permission,
            _ => Class::Failed,
        };
        Self::new(class, format!("cannot {doing} {}: {error}", shown(path)))
    }

    /// Exit code of the `mountctl` form.
    pub fn code(&self) -> u8 {
        match self.class {
            Class::Usage => 2,
            Class::Permission | Class::System | Class::Failed => 1,
            Class::Interrupted => 130,
            Class::Daemon(code) => code.max(1),
        }
    }

    /// Exit code as mount(8) defines it.
    pub fn mount8_code(&self) -> u8 {
        match self.class {
            Class::Usage | Class::Permission => 1,
            Class::System => 2,
            Class::Interrupted => 8,
            Class::Failed | Class::Daemon(_) => 32,
        }
    }
}
