//! Storage classes: how volumes and their images are made.
//!
//! Why: users of Kubernetes say once in a class where an image comes from, and then only claim.
//! How: a class is a record, put whole; what is made by it says so, and stays when it goes.
//! Never: makes anything by itself: a volume that is created by a class does (rule 13).
//! Start at [`World::put_class`].

use super::command::{Applied, Outcome};
use super::error::ManagerError;
use super::records::ClassRecord;
use super::world::{Action, Touched, World};
use crate::names::ClassName;

impl World {
    pub(super) fn put_class(&mut self, new: ClassRecord, touched: &mut Touched) -> Outcome {
        let name = new.name.clone();
        let applied = match self.classes.get(&name) {
            None => Applied::Created,
            Some(known)
                if ClassRecord { created_unix_s: known.created_unix_s, ..new.clone() }
                    == *known =>
            {
                return Outcome::Class(name, Applied::Unchanged);
            }
            Some(_) => Applied::Configured,
        };
        touched.actions.push(Action::SaveClass(Box::new(new.clone())));
        self.classes.insert(name.clone(), new);
        Outcome::Class(name, applied)
    }

    pub(super) fn delete_class(
        &mut self,
        name: ClassName,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        if self.classes.remove(&name).is_none() {
            return Err(ManagerError::NoSuchClass { name });
        }
        touched.actions.push(Action::ForgetClass(name));
        Ok(Outcome::Done)
    }

    /// Every storage class, by name.
    #[must_use]
    pub fn classes(&self) -> Vec<ClassRecord> {
        self.classes.values().cloned().collect()
    }

    /// One storage class.
    #[must_use]
    pub fn class(&self, name: &ClassName) -> Option<ClassRecord> {
        self.classes.get(name).cloned()
    }
}
