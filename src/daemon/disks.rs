//! A disk in the configuration: its directory, and the tags that it has.
//!
//! Why: most disks are a path and nothing more, and that is how they are written; tags are for who has disks
//! of several kinds.
//! How: a text is the path; a table has `path` and `tags`.
//! Never: ignores a key that it doesn't know.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use crate::names::Tag;

/// A disk in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfiguredDisk {
    /// Its directory.
    pub path: PathBuf,
    /// Its tags.
    pub tags: BTreeSet<Tag>,
}

impl From<PathBuf> for ConfiguredDisk {
    fn from(path: PathBuf) -> Self {
        Self { path, tags: BTreeSet::new() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    path: PathBuf,
    #[serde(default)]
    tags: BTreeSet<Tag>,
}

impl<'de> Deserialize<'de> for ConfiguredDisk {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = ConfiguredDisk;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the path of a disk, or a table with path and tags")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<ConfiguredDisk, E> {
                Ok(PathBuf::from(path).into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ConfiguredDisk, A::Error> {
                let Table { path, tags } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ConfiguredDisk { path, tags })
            }
        }
        from.deserialize_any(Either)
    }
}
