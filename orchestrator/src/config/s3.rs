//! D: the bucket that a farm's objects lie in, if they do not lie in files.

use alloy_shared::config::{Key, Layers, Origin, parse};
use alloy_shared::secret::Secret;

use super::checked_url;

/// A bucket, the place in it, and who may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3 {
    pub bucket: String,
    /// Before every key, without a slash at either end. Empty: the bucket is the farm's own.
    pub prefix: String,
    /// Absent: Amazon's own for the region.
    pub endpoint: Option<String>,
    pub region: String,
    pub key_id: String,
    pub secret: Secret<String>,
    /// Downloads of artifacts are redirected to links that the bucket opens by itself.
    pub presign: bool,
}

const URL: Key = Key { name: "s3_url", flag: None, variable: Some("ALLOY_S3_URL") };
const ENDPOINT: Key = Key { name: "s3_endpoint", flag: None, variable: Some("ALLOY_S3_ENDPOINT") };
const REGION: Key = Key { name: "s3_region", flag: None, variable: Some("ALLOY_S3_REGION") };
const ALLOW_HTTP: Key = Key { name: "s3_allow_http", flag: None, variable: Some("ALLOY_S3_ALLOW_HTTP") };
const PRESIGN: Key = Key { name: "s3_presign", flag: None, variable: Some("ALLOY_S3_PRESIGN") };
const KEY_ID: Key = Key { name: "aws_access_key_id", flag: None, variable: Some("AWS_ACCESS_KEY_ID") };
const SECRET: Key = Key { name: "aws_secret_access_key", flag: None, variable: Some("AWS_SECRET_ACCESS_KEY") };

impl S3 {
    /// Takes what is said about a bucket. `None`: nothing, or something that cannot be used.
    pub(super) fn take(layers: &mut Layers) -> Option<Self> {
        let url = layers.take_given(URL, |text| place(text).map(|_| text.to_owned()));
        let endpoint = layers.take_given(ENDPOINT, checked_url);
        let region = layers.take(REGION, "us-east-1".to_owned(), |text| name(text, "-", "is no region like eu-west-1"));
        let allow_http = layers.take(ALLOW_HTTP, false, parse("is neither true nor false"));
        let presign = layers.take(PRESIGN, false, parse("is neither true nor false"));
        let key_id = layers.take_given(KEY_ID, visible);
        let secret = layers.take_secret(SECRET, "is no secret key: it holds blanks", |text| visible(text).ok());

        if layers.origin(URL) == Origin::Default {
            for key in [ENDPOINT, PRESIGN, ALLOW_HTTP] {
                let origin = layers.origin(key);
                if origin != Origin::Default {
                    let why = "means nothing without ALLOY_S3_URL, which names the bucket".to_owned();
                    layers.problem(key.name, origin, why);
                }
            }
            return None;
        }
        for (missing, key) in [(key_id.is_none(), KEY_ID), (secret.is_none(), SECRET)] {
            if missing && layers.origin(key) == Origin::Default {
                let why = "is missing: the bucket of ALLOY_S3_URL is opened with it".to_owned();
                layers.problem(key.name, Origin::Default, why);
            }
        }
        let open =
            endpoint.as_deref().and_then(|url| url.strip_prefix("http://")).is_some_and(|rest| !is_loopback(rest));
        if open && !allow_http {
            let why = "everybody on the way could read and change the farm's bytes: use https, or say \
                       ALLOY_S3_ALLOW_HTTP=true if the network is yours";
            layers.problem(ENDPOINT.name, layers.origin(ENDPOINT), why.to_owned());
        }
        let (bucket, prefix) = place(&url?).ok()?;
        Some(Self { bucket, prefix, endpoint, region, key_id: key_id?, secret: secret?, presign })
    }

    /// The bucket and the place in it.
    pub fn url(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("s3://{}{slash}{}", self.bucket, self.prefix)
    }

    /// For people.
    pub fn place(&self) -> String {
        let at = self.endpoint.as_ref().map(|endpoint| format!(" at {endpoint}")).unwrap_or_default();
        format!("{}{at}", self.url())
    }
}

/// Reads `s3://bucket/prefix`.
fn place(text: &str) -> Result<(String, String), String> {
    let wrong = || "is no place like s3://bucket/prefix of letters, digits, `.`, `_` and `-`".to_owned();
    let rest = text.strip_prefix("s3://").ok_or_else(wrong)?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_end_matches('/');
    let plain = |part: &str| name(part, "._-", "").is_ok() && part != "." && part != "..";
    let fine = plain(bucket) && (prefix.is_empty() || prefix.split('/').all(plain)) && text.len() <= 255;
    if fine { Ok((bucket.to_owned(), prefix.to_owned())) } else { Err(wrong()) }
}

fn name(text: &str, also: &str, why: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || also.contains(c);
    if !text.is_empty() && text.chars().all(plain) { Ok(text.to_owned()) } else { Err(why.to_owned()) }
}

fn visible(text: &str) -> Result<String, String> {
    let fine = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
    if fine { Ok(text.to_owned()) } else { Err("is no access key: it holds blanks".to_owned()) }
}

fn is_loopback(rest: &str) -> bool {
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((host, _)) => host,
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host == "localhost" || host.parse::<core::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use alloy_shared::config::{Problem, Setting};

    use super::super::{Config, Flags};
    use super::*;

    fn resolve(variables: &[(&str, &str)]) -> Result<(Config, Vec<Setting>), Vec<Problem>> {
        let all = [("HOME", "/home/u")].iter().chain(variables);
        let all: BTreeMap<_, _> = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::resolve(&Flags::default(), &all, None)
    }

    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AKIA1"), ("AWS_SECRET_ACCESS_KEY", "hush/+=")];

    #[test]
    fn a_bucket_is_read_and_its_secret_is_shown_nowhere() {
        let mut variables = vec![("ALLOY_S3_URL", "s3://b.x/farm/one/"), ("ALLOY_S3_ENDPOINT", "http://[::1]:9/s3/")];
        variables.extend(KEYS);
        let (config, settings) = resolve(&variables).unwrap();
        let s3 = config.s3.clone().unwrap();
        assert_eq!((s3.bucket.as_str(), s3.prefix.as_str(), s3.region.as_str()), ("b.x", "farm/one", "us-east-1"));
        assert_eq!(s3.place(), "s3://b.x/farm/one at http://[::1]:9/s3");
        assert_eq!((s3.secret.expose().as_str(), s3.presign), ("hush/+=", false));
        assert!(!format!("{config:?} {settings:?}").contains("hush"));
        assert_eq!(resolve(&KEYS).unwrap().0.s3, None, "keys alone name no bucket");
    }

    #[test]
    fn everything_that_is_wrong_is_told_together() {
        let names = |variables: &[(&str, &str)]| -> Vec<String> {
            let problems = resolve(variables).unwrap_err();
            assert!(!format!("{problems:?}").contains("hush"), "{problems:?}");
            problems.into_iter().map(|problem| problem.name).collect()
        };
        let bad = [("ALLOY_S3_URL", "https://b"), ("ALLOY_S3_ENDPOINT", "b"), ("AWS_SECRET_ACCESS_KEY", "hu sh")];
        assert_eq!(names(&bad), ["s3_url", "s3_endpoint", "aws_secret_access_key", "aws_access_key_id"]);
        assert_eq!(names(&[("ALLOY_S3_PRESIGN", "true")]), ["s3_presign"]);
        assert_eq!(names(&[("ALLOY_S3_URL", "s3://b")]), ["aws_access_key_id", "aws_secret_access_key"]);
        for endpoint in ["http://10.0.0.1", "http://minio:9000", "http://[fd00::1]:9000/x"] {
            let mut variables = vec![("ALLOY_S3_URL", "s3://b"), ("ALLOY_S3_ENDPOINT", endpoint)];
            variables.extend(KEYS);
            assert_eq!(names(&variables), ["s3_endpoint"]);
            variables.push(("ALLOY_S3_ALLOW_HTTP", "true"));
            resolve(&variables).unwrap();
        }
    }

    #[test]
    fn only_plain_places_are_taken() {
        assert_eq!(place("s3://b"), Ok(("b".into(), String::new())));
        assert_eq!(place("s3://b/"), Ok(("b".into(), String::new())));
        for wrong in ["", "s3://", "s3:///p", "b", "s3://b/..", "s3://b//c", "s3://b/c d", "s3://k:s@b/c", "s3://b/?x"]
        {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
