//! A secret, given as it is or as the place to read it from.
//!
//! Why: what must not be shown should not be able to show itself; and a password that is rotated
//! lives in a file, not in a record.
//! How: JSON knows three forms: `"text"`, `{"file": "/path"}`, `{"env": "NAME"}`. A place is read
//! when the secret is used. [`Trust`] says which places: a daemon reads only below its
//! `secrets_dir` and from variables named `BEDPLATE_SECRET_…`, because whoever may use its socket
//! could else send any file of the node to any server.
//! Never: prints a secret; what is read exists only in the request that needs it.
//! Start at [`Trust::read`].

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest secret or PEM bundle that is read from a file, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;
/// How the names of variables begin that a daemon may read.
const ENV_PREFIX: &str = "BEDPLATE_SECRET_";

/// A secret. Prints itself as `***`, or as the place where it is.
///
/// Its serde form is whole: for requests and the catalog, never for an answer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(Form);

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    File { file: PathBuf },
    Env { env: String },
}

impl Secret {
    /// The secret itself.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self(Form::Text(text.to_owned()))
    }

    /// The content of a file, without the line end behind it.
    #[must_use]
    pub fn file(path: &Path) -> Self {
        Self(Form::File { file: path.to_owned() })
    }

    /// The value of an environment variable.
    #[must_use]
    pub fn env(name: &str) -> Self {
        Self(Form::Env { env: name.to_owned() })
    }

    /// The text, if it is given as it is.
    pub(super) fn literal(&self) -> Option<&str> {
        match &self.0 {
            Form::Text(text) => Some(text),
            Form::File { .. } | Form::Env { .. } => None,
        }
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Form::Text(_) => f.write_str("***"),
            Form::File { file } => write!(f, "file {}", file.display()),
            Form::Env { env } => write!(f, "variable {env}"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({self})")
    }
}

/// On whose word places are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The person whose process this is: any file and variable that they can read, and the
    /// environment's S3 settings.
    Person,
    /// Whoever may use a daemon's socket.
    Clients {
        /// Files below this directory may be read; `None`: no file.
        secrets_dir: Option<PathBuf>,
    },
}

/// Why a secret or an access is not usable. Never holds the secret.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum AccessError {
    #[error("{what}: {place} may not be read by this daemon; {rule}")]
    NotAllowed { what: &'static str, place: String, rule: String },
    #[error("{what}: cannot read {place}")]
    Read {
        what: &'static str,
        place: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{what}: {fault}")]
    Unusable { what: &'static str, fault: String },
}

impl Trust {
    /// The secret's text. `what` names it in errors. Blocks for as long as a small file takes.
    ///
    /// # Errors
    /// [`AccessError`]: the place may not be read, or can't be.
    pub fn read(&self, what: &'static str, secret: &Secret) -> Result<String, AccessError> {
        let place = secret.to_string();
        match &secret.0 {
            Form::Text(text) => Ok(text.clone()),
            Form::File { file } => {
                let file = self.allowed_file(what, file)?;
                let text =
                    read_file(&file).map_err(|source| AccessError::Read { what, place, source })?;
                Ok(text.trim_end_matches(['\n', '\r']).to_owned())
            }
            Form::Env { env } => {
                if *self != Self::Person && !env.starts_with(ENV_PREFIX) {
                    let rule = format!("name a variable that begins with {ENV_PREFIX}");
                    return Err(AccessError::NotAllowed { what, place, rule });
                }
                std::env::var(env).map_err(|_| AccessError::Unusable {
                    what,
                    fault: format!("{place} is not set, or not text"),
                })
            }
        }
    }

    /// The file to open: for a daemon only one that is, links resolved, below its directory.
    fn allowed_file(&self, what: &'static str, file: &Path) -> Result<PathBuf, AccessError> {
        let secrets_dir = match self {
            Self::Person => return Ok(file.to_owned()),
            Self::Clients { secrets_dir } => secrets_dir,
        };
        let place = format!("file {}", file.display());
        let refuse = |rule: String| AccessError::NotAllowed { what, place: place.clone(), rule };
        let Some(dir) = secrets_dir else {
            return Err(refuse("set secrets_dir, or send the content".into()));
        };
        // Both as they really are. A file elsewhere and one that isn't there answer alike: a
        // client must not learn which files the node has.
        let outside = || refuse(format!("name a file below {}", dir.display()));
        let (Ok(real), Ok(dir)) = (file.canonicalize(), dir.canonicalize()) else {
            return Err(outside());
        };
        if file.is_absolute() && real.starts_with(dir) { Ok(real) } else { Err(outside()) }
    }
}

fn read_file(path: &Path) -> std::io::Result<String> {
    let file = std::fs::File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(std::io::Error::from(std::io::ErrorKind::FileTooLarge));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_print_itself() {
        let secret = Secret::text("hunter2");
        assert_eq!(format!("{secret} {secret:?}"), "*** Secret(***)");
        assert_eq!(Secret::env("A").to_string(), "variable A");
    }

    #[test]
    fn the_three_forms_come_back_from_json() {
        for json in [r#""hunter2""#, r#"{"file":"/a"}"#, r#"{"env":"A"}"#] {
            let secret: Secret = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::to_string(&secret).unwrap(), json);
        }
        let error = serde_json::from_str::<Secret>(r#"{"fil":"hunter2"}"#).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn a_daemon_reads_only_below_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("secrets"), dir.path().join("other"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("pw"), "hunter2\n").unwrap();
        std::fs::write(&outside, "private").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        let trust = Trust::Clients { secrets_dir: Some(inside.clone()) };
        let read = |path: &Path| trust.read("password", &Secret::file(path));
        assert_eq!(read(&inside.join("pw")).unwrap(), "hunter2");
        let up = inside.join("../other");
        for bad in [&outside, &inside.join("link"), &up, &inside.join("none"), &inside] {
            let error = read(bad).unwrap_err().to_string();
            assert!(!error.contains("private"), "{error}");
        }
        let none = Trust::Clients { secrets_dir: None };
        assert!(none.read("password", &Secret::file(&inside.join("pw"))).is_err());
        assert_eq!(Trust::Person.read("x", &Secret::file(&outside)).unwrap(), "private");
    }

    #[test]
    fn a_daemon_reads_only_variables_that_were_meant_for_it() {
        let trust = Trust::Clients { secrets_dir: None };
        let error = trust.read("password", &Secret::env("PATH")).unwrap_err();
        assert!(matches!(error, AccessError::NotAllowed { .. }));
        let unset = trust.read("password", &Secret::env("BEDPLATE_SECRET_NONE")).unwrap_err();
        assert!(matches!(unset, AccessError::Unusable { .. }));
        assert!(Trust::Person.read("x", &Secret::env("PATH")).is_ok());
    }
}
