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
        // Of two that come at the same time both may pass: see `still_claimed`.
        Ok(self.read_piece(&key, 0, LEN).await? == ours.as_bytes())
    }

    /// The same again, for whoever is about to remove what this farm does not know.
    pub async fn still_claimed(&self) -> Result<bool, BlobError> {
        match self {
            Self::S3(s3) => match s3.owner().get() {
                Some(farm) => self.claim(farm).await,
                None => Ok(true),
            },
            Self::Fs(_) | Self::Mem(_) => Ok(true),
        }
    }
}
