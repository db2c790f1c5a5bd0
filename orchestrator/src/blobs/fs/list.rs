//! S: objects of a directory in the order of their keys.

use std::fs::{self, DirEntry};
use std::io;
use std::time::UNIX_EPOCH;

use alloy_shared::env::Ms;
use alloy_shared::limits;

use super::{Fs, PARTIAL_AGE_MS, Place, fault, off_thread};
use crate::blobs::{BlobError, BlobKey, Listed};
use crate::sums::Seal;

impl Fs {
    pub(in super::super) async fn list(&self, prefix: &str, after: Option<&BlobKey>) -> Result<Vec<Listed>, BlobError> {
        let place = self.place.clone();
        let (prefix, after) = (prefix.to_owned(), after.map(|key| key.as_str().to_owned()).unwrap_or_default());
        off_thread(move || {
            let mut page = Page { prefix: &prefix, after: &after, found: Vec::new() };
            page.walk(&place, "").map_err(fault("list objects"))?;
            Ok(page.found)
        })
        .await
    }

    /// Removes objects that nobody came for in a day, where objects are only on their way to another place.
    pub(in super::super) async fn sweep(&self, now: Ms) -> Result<(), BlobError> {
        let mut after = None;
        loop {
            let page = self.list("", after.as_ref()).await?;
            for object in page.iter().filter(|object| now.0.saturating_sub(object.modified.0) > PARTIAL_AGE_MS) {
                self.delete(&object.key).await?;
            }
            match page.into_iter().next_back() {
                Some(last) => after = Some(last.key),
                None => return Ok(()),
            }
        }
    }
}

struct Page<'a> {
    prefix: &'a str,
    /// Empty: from the first one on.
    after: &'a str,
    found: Vec<Listed>,
}

impl Page<'_> {
    /// `above` is empty or ends in a slash.
    fn walk(&mut self, place: &Place, above: &str) -> io::Result<()> {
        let dir = place.root.join("objects").join(above);
        let mut entries = Vec::new();
        let listed = match fs::read_dir(dir) {
            // Its last object was removed while the directory above was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !above.is_empty() => return Ok(()),
            listed => listed?,
        };
        for entry in listed {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let slash = if entry.file_type()?.is_dir() { "/" } else { "" };
            entries.push((format!("{above}{name}{slash}"), entry));
        }
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (name, entry) in entries {
            if self.found.len() == limits::BLOBS_PER_PAGE {
                return Ok(());
            }
            if !name.ends_with('/') {
                self.file(&name, &entry)?;
                continue;
            }
            let wanted = name.starts_with(self.prefix) || self.prefix.starts_with(&name);
            if wanted && (name.as_str() > self.after || self.after.starts_with(&name)) {
                self.walk(place, &name)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, name: &str, entry: &DirEntry) -> io::Result<()> {
        if !name.starts_with(self.prefix) || name <= self.after {
            return Ok(());
        }
        let Some(key) = BlobKey::parse(name) else { return Ok(()) };
        let meta = match entry.metadata() {
            // It was removed while the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            meta => meta?,
        };
        // What is too short for a seal is damaged, and there nevertheless.
        let size = Seal::sealed_len(meta.len()).unwrap_or(0);
        let modified = meta.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let modified = Ms(i64::try_from(modified.as_millis()).unwrap_or(i64::MAX));
        self.found.push(Listed { key, size, modified });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_goes_while_objects_are_listed_is_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let fs = Fs::open(dir.path().to_owned(), Ms(0), 0).await.unwrap();
        let mut page = Page { prefix: "", after: "", found: Vec::new() };
        page.walk(&fs.place, "logs/gone/").unwrap();
        assert_eq!(page.found.len(), 0);
    }
}
