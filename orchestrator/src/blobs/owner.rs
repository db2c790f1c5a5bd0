//! S: whose objects lie in a bucket. Of two farms in one place each would take the other's for garbage.

use alloy_shared::id::Digest;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::{BlobError, BlobKey, Blobs};

/// A mark that is one farm's from the first start on.
const KEY: &str = "owner";
const LEN: u32 = 64;

impl Blobs {
    /// False: the bucket is another farm's. One that is nobody's is this one's from now on; a directory always is.
    pub async fn claim(&self, farm: &Digest) -> Result<bool, BlobError> {
        let Self::S3(s3) = self else { return Ok(true) };
        let _ = s3.owner().set(*farm);
        let (key, ours) = (BlobKey(KEY.to_owned()), farm.to_string());
        match self.read_piece(&key, 0, LEN).await {
            Err(BlobError::Missing(_)) => {}
            found => return Ok(found? == ours.as_bytes()),
        }
        let body = stream::iter([Ok(Bytes::from(ours.clone()))]).boxed();
        self.put(&key, body, None).await?;
        // Of two that come at the same time both may pass here, and one in `is_ours`.
        Ok(self.read_piece(&key, 0, LEN).await? == ours.as_bytes())
    }

    /// Whether the mark is still the one that was claimed here, for whoever is about to remove things.
    pub async fn is_ours(&self) -> Result<bool, BlobError> {
        let Self::S3(s3) = self else { return Ok(true) };
        let Some(farm) = s3.owner().get() else { return Ok(true) };
        match self.read_piece(&BlobKey(KEY.to_owned()), 0, LEN).await {
            Err(BlobError::Missing(_)) => Ok(false),
            found => Ok(found? == farm.to_string().as_bytes()),
        }
    }
}
