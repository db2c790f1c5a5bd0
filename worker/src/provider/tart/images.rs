//! S: images in the cache of `tart`: which are there, bringing one, removing one.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use alloy_shared::id::Digest;
use alloy_shared::wire::image::PullProgress;
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::command::{Failed, QUICK, Said};
use super::says::{self, PullStep, Trouble, digest_of, is_remote};
use super::{TartHost, host, vm_error};
use crate::provider::{Image, ImageRef, VmError, VmFault, VmName};

/// The registry answers within this, or unfinished downloads of other images are left to the collector.
const BEGIN: Duration = Duration::from_secs(30);

/// For an image that was pulled.
const LOOKS: u32 = 3;

impl TartHost {
    /// The image's digest, if it is on this host.
    pub(super) async fn cached(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        if !is_remote(&image.0) {
            // A VM of this host as an image: it has no digest but its name's.
            let there = self.vm_home_of(&image.0).join("config.json").exists();
            let digest = Digest::of(format!("local:{}", image.0).as_bytes());
            return Ok(there.then(|| self.remember(digest, image.0.clone())));
        }
        match self.tart.must(&["fqn", &image.0], QUICK).await? {
            Ok(fqn) => {
                let digest = digest_of(&fqn).ok_or_else(|| host(&format!("tart fqn: `{}`", fqn.trim())))?;
                Ok(Some(self.remember(digest, fqn.trim().to_owned())))
            }
            Err(Failed { trouble: Trouble::Missing, .. }) => Ok(None),
            Err(failed) => {
                tracing::warn!(%image, says = failed.says, "whether an image is here is not known");
                Ok(None)
            }
        }
    }

    fn remember(&self, digest: Digest, name: String) -> Digest {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, name);
        digest
    }

    /// Every image by its digest. A tag is a name of the one that it leads to.
    pub(super) async fn cache(&self) -> Result<Vec<Image>, VmError> {
        self.unfinished.forget_old(self.setup.env.now().mono);
        let listed = self.listed().await?;
        let mut images: BTreeMap<Digest, Image> = BTreeMap::new();
        for entry in listed.iter().filter(|entry| entry.is_image()) {
            let Some(digest) = digest_of(&entry.name) else { continue };
            let image = images.entry(digest).or_insert_with(|| Image {
                digest,
                names: Vec::new(),
                size_bytes: 0,
                removable: true,
            });
            image.names.push(ImageRef(entry.name.clone()));
            image.size_bytes = image.size_bytes.max(entry.size_bytes());
        }
        for tag in listed.iter().filter(|entry| entry.is_image() && digest_of(&entry.name).is_none()) {
            let name = ImageRef(tag.name.clone());
            // One that goes between the two questions is gone.
            if let Some(image) = self.cached(&name).await?.and_then(|digest| images.get_mut(&digest)) {
                image.names.insert(0, name);
            }
        }
        let mut images: Vec<Image> = images.into_values().collect();
        // Whoever keeps a VM here under a name of their own may have jobs run in clones of it.
        for vm in listed.iter().filter(|entry| !entry.is_image() && VmName::parse(&entry.name).is_err()) {
            let name = ImageRef(vm.name.clone());
            if let Some(digest) = self.cached(&name).await? {
                images.push(Image { digest, names: vec![name], size_bytes: vm.size_bytes(), removable: false });
            }
        }
        Ok(images)
    }

    pub(super) async fn bring(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<Digest, VmError> {
        if !is_remote(&image.0) {
            return self.cached(image).await?.ok_or_else(|| {
                VmError::policy(VmFault::NoImage, format!("there is no VM `{image}` on this host to clone"))
            });
        }
        let _one = self.pulling.lock().await;
        tracing::info!(%image, "pulling");
        let ended = self.download(image, progress, stop).await;
        // Before anybody's next command of `tart` clears it away.
        self.unfinished.hold(self.setup.env.now().mono);
        let ended = ended.map_err(|error| VmError { what: VmFault::Pull, ..error })?;
        if ended.status != Some(0) {
            let failed = Failed { trouble: says::judge(&ended), says: says::tail(&ended) };
            return Err(match failed.trouble {
                // Of a registry it says that there is none, and of a missing image no other word.
                Trouble::Missing => VmError::farm(VmFault::Pull, format!("tart pull: {}", failed.says)),
                _ => vm_error(VmFault::Pull, "pull", &failed),
            });
        }
        // One answer proves nothing: the question may fail for a reason of its own, or cross a tag that somebody moves.
        for _ in 0..LOOKS {
            if let Some(digest) = self.cached(image).await? {
                return Ok(digest);
            }
        }
        Err(VmError::farm(VmFault::Pull, format!("{image} was pulled and is not there")))
    }

    /// Runs the pull. While it begins and there are unfinished downloads, nothing else of `tart` runs: one of them may be
    /// this image's, which the pull must find unlocked and which any other command would throw away.
    async fn download(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<says::Ended, VmError> {
        let steps = progress.clone();
        let (began, mut begins) = watch::channel(false);
        let said: Said = std::sync::Arc::new(move |line: &str| match says::pull_step(line) {
            Some(PullStep::Disk { total_bytes }) => {
                steps.send_modify(|now| now.total_bytes = Some(total_bytes));
                began.send_replace(true);
            }
            Some(PullStep::Percent(percent)) => {
                steps.send_modify(|now| now.percent = percent);
            }
            Some(PullStep::Settled) => {
                began.send_replace(true);
            }
            None => {}
        });
        let quiet = if self.unfinished.is_empty() {
            None
        } else {
            // In this order, as whoever makes a VM holds the first while it asks for the second.
            Some((self.making.lock().await, self.tart.gate.write().await))
        };
        self.unfinished.release();
        // SIGTERM keeps what has been downloaded; SIGINT would throw it away.
        let stall = Duration::from_millis(self.setup.pull_stall_ms);
        let arguments = ["pull", &image.0];
        let mut run = std::pin::pin!(self.tart.watched(&arguments, stall, Signal::SIGTERM, Some(said), stop));
        tokio::select! {
            biased;
            ended = &mut run => return ended,
            _ = tokio::time::timeout(BEGIN, begins.wait_for(|began| *began)), if quiet.is_some() => {}
        }
        self.unfinished.hold(self.setup.env.now().mono);
        drop(quiet);
        run.await
    }

    /// Removes the tags that lead to it, then the image, unless the last tag took it along.
    pub(super) async fn evict(&self, digest: &Digest) -> Result<(), VmError> {
        let Some(image) = self.cache().await?.into_iter().find(|image| image.digest == *digest && image.removable)
        else {
            return Ok(());
        };
        for name in &image.names {
            self.delete_name(name).await?;
        }
        match self.cache().await?.iter().any(|image| image.digest == *digest) {
            true => Err(VmError::farm(VmFault::Destroy, format!("image {digest} was deleted and is still listed"))),
            false => Ok(()),
        }
    }

    /// With the last tag goes the image.
    pub(super) async fn delete_name(&self, name: &ImageRef) -> Result<(), VmError> {
        match self.tart.must(&["delete", &name.0], QUICK).await? {
            Ok(_) | Err(Failed { trouble: Trouble::Missing, .. }) => Ok(()),
            Err(failed) => Err(vm_error(VmFault::Destroy, "delete", &failed)),
        }
    }
}
