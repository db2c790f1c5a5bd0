//! D: the Supabase project whose people may sign in.

use alloy_shared::config::{Key, Layers, Origin};
use alloy_shared::secret::Secret;

use super::checked_url;

/// A Supabase project with its people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supabase {
    /// Without a slash at its end.
    pub url: String,
    /// Of projects that still sign with a shared secret.
    pub jwt_secret: Option<Secret<String>>,
}

const URL: Key = Key { name: "supabase_url", flag: None, variable: Some("SUPABASE_URL") };
const SECRET: Key = Key { name: "supabase_jwt_secret", flag: None, variable: Some("SUPABASE_JWT_SECRET") };
/// Bytes of a shared secret: a shorter one can be tried out.
const SECRET_MIN: usize = 32;

impl Supabase {
    /// Takes what is said about a project. `None`: nothing, or something that cannot be used.
    pub(super) fn take(layers: &mut Layers) -> Option<Self> {
        let url = layers.take_given(URL, |text| {
            let url = checked_url(text)?;
            // Whoever answers in its place decides who signs in.
            match url.strip_prefix("http://").map(is_loopback) {
                None | Some(true) => Ok(url),
                Some(false) => Err("is reached without TLS: only a service on this machine may be http://".to_owned()),
            }
        });
        let secret =
            layers.take_secret(SECRET, "is too short for a secret: the dashboard shows it as \"JWT secret\"", |text| {
                (text.trim().len() >= SECRET_MIN).then(|| text.trim().to_owned())
            });
        if secret.is_some() && layers.origin(URL) == Origin::Default {
            let why = "says nothing without supabase_url: whose secret is it?".to_owned();
            layers.problem(SECRET.name, layers.origin(SECRET), why);
        }
        url.map(|url| Supabase { url, jwt_secret: secret })
    }
}

/// True if the host of an address without its scheme is this machine.
fn is_loopback(rest: &str) -> bool {
    let host = rest.split('/').next().unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<core::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{Config, Flags};

    fn resolve(variables: &[(&str, &str)]) -> Result<(Config, String), Vec<alloy_shared::config::Problem>> {
        let home = [("HOME", "/home/u")];
        let all = home.iter().chain(variables).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let resolved = Config::resolve(&Flags::default(), &all.collect::<BTreeMap<_, _>>(), None)?;
        Ok((resolved.0, format!("{:?}", resolved.1)))
    }

    #[test]
    fn a_project_is_named_by_its_url_and_its_secret_is_shown_nowhere() {
        let secret = "0123456789abcdef0123456789abcdef";
        let both = [("SUPABASE_URL", "https://abc.supabase.co/"), ("SUPABASE_JWT_SECRET", secret)];
        let (config, settings) = resolve(&both).unwrap();
        assert!(!format!("{config:?}{settings}").contains(secret));
        let supabase = config.supabase.unwrap();
        assert_eq!(supabase.url, "https://abc.supabase.co");
        assert_eq!(supabase.jwt_secret.unwrap().expose(), secret);
        assert_eq!(resolve(&both[..1]).unwrap().0.supabase.unwrap().jwt_secret, None);
        for url in ["http://127.0.0.1:54321", "http://localhost:54321", "http://[::1]:1"] {
            assert!(resolve(&[("SUPABASE_URL", url)]).is_ok(), "{url}");
        }
        for (variables, name, why) in [
            (&[("SUPABASE_URL", "http://abc.supabase.co")][..], "supabase_url", "without TLS"),
            (&[("SUPABASE_URL", "http://localhost.evil.test")], "supabase_url", "without TLS"),
            (&[("SUPABASE_URL", "http://127.0.0.1.evil.test:1")], "supabase_url", "without TLS"),
            (&[("SUPABASE_URL", "abc.supabase.co")], "supabase_url", "no URL"),
            (&both[1..], "supabase_jwt_secret", "without supabase_url"),
            (&[both[0], ("SUPABASE_JWT_SECRET", "short")], "supabase_jwt_secret", "too short"),
        ] {
            let problems = resolve(variables).unwrap_err();
            assert_eq!(problems[0].name, name);
            assert!(problems[0].message.contains(why) && !problems[0].message.contains(secret), "{problems:?}");
        }
    }
}
