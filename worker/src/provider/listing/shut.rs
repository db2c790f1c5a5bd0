use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;

/// A workspace with places that only root can read.
pub(in crate::provider) struct Shut {
    dir: tempfile::TempDir,
}

impl Shut {
    pub(in crate::provider) const RULES: [&str; 5] = ["out", "far/shut/deep/f", "gone/**", "plain/*", "!out/left"];
    const MODES: [(&str, u32); 5] =
        [("out/shut", 0), ("out/seen", 0o444), ("out/left", 0), ("far/shut", 0), ("out/secret", 0o200)];

    pub(in crate::provider) fn new() -> Self {
        let shut = Self { dir: tempfile::tempdir().unwrap() };
        // Who is not root gets as far as the workspace.
        Self::chmod(shut.dir.path().to_owned(), 0o755);
        for file in ["out/good", "out/secret", "out/shut/f", "out/seen/f", "out/left/f", "far/shut/deep/f"] {
            let path = shut.work().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "12345").unwrap();
        }
        Self::MODES.into_iter().for_each(|(place, mode)| Self::chmod(shut.work().join(place), mode));
        shut
    }

    pub(in crate::provider) fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn chmod(path: PathBuf, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    /// Holds what `list` makes of the workspace against what it is for somebody who is not root.
    pub(in crate::provider) fn check(&self, list: impl Fn(&[&str]) -> Listing) {
        let Listing { files, unfit, unfit_more } = list(&Self::RULES);
        let files: Vec<_> = files.into_iter().map(|file| (file.path, file.size)).collect();
        assert_eq!(files, [("out/good".to_owned(), 5)], "it spoils nothing");
        let unfit: Vec<_> = unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why)).collect();
        let expected = [
            ("far/shut", Misfit::Closed),
            ("out/secret", Misfit::Unreadable),
            ("out/seen", Misfit::Closed),
            ("out/shut", Misfit::Closed),
        ];
        assert_eq!(unfit, expected.map(|(name, why)| (name.to_owned(), why)));
        assert_eq!(unfit_more, 0);
        assert_eq!(list(&["out/good"]).unfit, [], "nobody asked for the rest");

        Self::chmod(self.work(), 0);
        let Listing { files, unfit, .. } = list(&["out/good"]);
        let unfit: Vec<_> = unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why)).collect();
        assert_eq!((files, unfit), (vec![], vec![(".".to_owned(), Misfit::Closed)]));
        Self::chmod(self.work(), 0o755);
    }
}

impl Drop for Shut {
    fn drop(&mut self) {
        for (place, _) in Self::MODES {
            let _goes_as_far_as_it_may =
                std::fs::set_permissions(self.work().join(place), Permissions::from_mode(0o700));
        }
    }
}

/// Somebody who is not root.
pub(in crate::provider) const STRANGER: u32 = 65534;
