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
        let Self::S3(_) = self else { return Ok(true) };
        let (key, ours) = (BlobKey(KEY.to_owned()), farm.to_string());
        match self.read_piece(&key, 0, LEN).await {
            Err(BlobError::Missing(_)) => {}
            found => return Ok(found? == ours.as_bytes()),
        }
        let body = stream::iter([Ok(Bytes::from(ours.clone()))]).boxed();
        self.put(&key, body, None).await?;
        // Another one may have come at the same time.
        Ok(self.read_piece(&key, 0, LEN).await? == ours.as_bytes())
    }
}
