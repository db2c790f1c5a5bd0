//! D: a sign-in token (JWT): its form, the key that may have signed it, its signature, and what it claims at this moment.
//!
//! The key decides the algorithm. What the token says of its own algorithm only chooses between the shared secret and the
//! published keys; a published key never checks an HMAC, and the secret never anything else.

use alloy_shared::env::Ms;
use alloy_shared::id::UserId;
use alloy_shared::limits;
use alloy_shared::secret::Secret;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use ring::signature::{ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey};
use ring::{error, hmac};
use serde::Deserialize;

/// The audience of people who have signed in.
pub const AUDIENCE: &str = "authenticated";

/// Why a sign-in token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadJwt {
    #[error("the sign-in token is longer than {} bytes", limits::SIGN_IN_TOKEN_MAX)]
    TooLong,
    #[error("the sign-in token is not three parts of base64url with JSON in them; was it copied whole?")]
    Form,
    #[error("the sign-in token is not signed")]
    Unsigned,
    #[error("the sign-in token is signed by a method that this farm does not take")]
    Method,
    #[error("the sign-in token asks for an extension that nobody here knows")]
    Critical,
    #[error("the sign-in token does not name the key that signed it")]
    NoKey,
    #[error("nobody knows the key that signed the sign-in token")]
    UnknownKey,
    #[error("the signature of the sign-in token is wrong")]
    Signature,
    #[error("the sign-in token was issued by another service than this farm's")]
    Issuer,
    #[error("the sign-in token is not a signed-in person's")]
    Audience,
    #[error("the sign-in token names no person")]
    Subject,
    #[error("the sign-in token has expired")]
    Expired,
    #[error("the sign-in token is from the future; are the clocks right?")]
    Future,
}

impl BadJwt {
    /// True when somebody may be guessing: not when the signature was good.
    pub fn is_guess(self) -> bool {
        !matches!(self, Self::Issuer | Self::Audience | Self::Subject | Self::Expired | Self::Future)
    }
}

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    pub user: UserId,
    pub email: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Hs256,
    Es256,
    Rs256,
}

/// A published key: what it can check is fixed by its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    pub kid: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// An uncompressed point.
    Es256(Vec<u8>),
    Rs256 {
        n: Vec<u8>,
        e: Vec<u8>,
    },
}

/// Reads a JWKS document. Keys of other kinds, for other uses, and nameless ones are left out.
pub fn published(document: &[u8]) -> Result<Vec<PublicKey>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(document)?;
    Ok(set.keys.into_iter().filter_map(|key| public_key(&serde_json::from_value(key).ok()?)).collect())
}

#[derive(Deserialize)]
struct Jwk {
    kid: Option<String>,
    kty: String,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

fn public_key(key: &Jwk) -> Option<PublicKey> {
    let signs = key.usage.as_deref().is_none_or(|usage| usage == "sig")
        && key.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
    let is = |alg: &str| signs && key.alg.as_deref().is_none_or(|own| own == alg);
    let bytes = |text: &Option<String>| BASE64URL.decode(text.as_ref()?).ok().filter(|bytes| !bytes.is_empty());
    let kind = match (key.kty.as_str(), key.crv.as_deref()) {
        ("EC", Some("P-256")) if is("ES256") => {
            let (x, y) = (bytes(&key.x)?, bytes(&key.y)?);
            (x.len() == 32 && y.len() == 32).then(|| Kind::Es256([&[4], &x[..], &y[..]].concat()))?
        }
        ("RSA", None) if is("RS256") => Kind::Rs256 { n: bytes(&key.n)?, e: bytes(&key.e)? },
        _ => return None,
    };
    Some(PublicKey { kid: key.kid.clone()?, kind })
}

/// What a farm takes.
pub struct Rules {
    pub issuer: String,
    secret: Option<hmac::Key>,
}

impl Rules {
    pub fn new(issuer: String, secret: Option<&Secret<String>>) -> Self {
        let key = |secret: &Secret<String>| hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes());
        Self { issuer, secret: secret.map(key) }
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Claims {
    iss: Option<String>,
    aud: Option<Audience>,
    exp: Option<f64>,
    nbf: Option<f64>,
    iat: Option<f64>,
    sub: Option<String>,
    email: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

/// A token whose form is good. Nothing of it is to be believed yet.
pub struct Unverified<'a> {
    method: Method,
    kid: Option<String>,
    signed: &'a [u8],
    claims: &'a str,
    signature: Vec<u8>,
}

impl<'a> Unverified<'a> {
    pub fn parse(text: &'a str) -> Result<Self, BadJwt> {
        if text.len() > limits::SIGN_IN_TOKEN_MAX {
            return Err(BadJwt::TooLong);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(BadJwt::Form)?;
        let (header, claims) = signed.split_once('.').ok_or(BadJwt::Form)?;
        if claims.contains('.') {
            return Err(BadJwt::Form);
        }
        let header = BASE64URL.decode(header).map_err(|_| BadJwt::Form)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| BadJwt::Form)?;
        let method = match header.alg.as_str() {
            "HS256" => Method::Hs256,
            "ES256" => Method::Es256,
            "RS256" => Method::Rs256,
            none if none.eq_ignore_ascii_case("none") => return Err(BadJwt::Unsigned),
            _ => return Err(BadJwt::Method),
        };
        if header.crit.is_some() {
            return Err(BadJwt::Critical);
        }
        if method != Method::Hs256 && header.kid.is_none() {
            return Err(BadJwt::NoKey);
        }
        let signature = BASE64URL.decode(signature).map_err(|_| BadJwt::Form)?;
        Ok(Self { method, kid: header.kid, signed: signed.as_bytes(), claims, signature })
    }

    /// The name of the published key that it needs, if it needs one.
    pub fn needs(&self) -> Option<&str> {
        match self.method {
            Method::Hs256 => None,
            Method::Es256 | Method::Rs256 => self.kid.as_deref(),
        }
    }

    /// Whose it is, if the secret or one of these keys has signed it and what it claims holds now.
    pub fn verify(&self, rules: &Rules, keys: &[PublicKey], now: Ms) -> Result<Person, BadJwt> {
        match self.method {
            Method::Hs256 => {
                let secret = rules.secret.as_ref().ok_or(BadJwt::Method)?;
                hmac::verify(secret, self.signed, &self.signature).map_err(|_| BadJwt::Signature)?;
            }
            Method::Es256 | Method::Rs256 => {
                let kid = self.kid.as_deref().ok_or(BadJwt::NoKey)?;
                let key = keys.iter().find(|key| key.kid == kid).ok_or(BadJwt::UnknownKey)?;
                self.check(&key.kind)?.map_err(|_| BadJwt::Signature)?;
            }
        }
        self.claims(rules, now)
    }

    /// The outer error: this key checks no signature of that method.
    fn check(&self, key: &Kind) -> Result<Result<(), error::Unspecified>, BadJwt> {
        match (self.method, key) {
            (Method::Es256, Kind::Es256(point)) => {
                Ok(UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(self.signed, &self.signature))
            }
            (Method::Rs256, Kind::Rs256 { n, e }) => {
                let key = RsaPublicKeyComponents { n, e };
                Ok(key.verify(&RSA_PKCS1_2048_8192_SHA256, self.signed, &self.signature))
            }
            (Method::Hs256 | Method::Es256 | Method::Rs256, _) => Err(BadJwt::Method),
        }
    }

    /// Read only behind the signature.
    fn claims(&self, rules: &Rules, now: Ms) -> Result<Person, BadJwt> {
        let bytes = BASE64URL.decode(self.claims).map_err(|_| BadJwt::Form)?;
        let claims: Claims = serde_json::from_slice(&bytes).map_err(|_| BadJwt::Form)?;
        if claims.iss.as_deref() != Some(rules.issuer.as_str()) {
            return Err(BadJwt::Issuer);
        }
        let meant = match &claims.aud {
            Some(Audience::One(one)) => one == AUDIENCE,
            Some(Audience::Many(many)) => many.iter().any(|one| one == AUDIENCE),
            None => false,
        };
        if !meant {
            return Err(BadJwt::Audience);
        }
        let (now_s, leeway) = (now.0 as f64 / 1_000.0, limits::SIGN_IN_LEEWAY_S as f64);
        if claims.exp.is_none_or(|exp| exp <= now_s) {
            return Err(BadJwt::Expired);
        }
        if claims.nbf.is_some_and(|nbf| nbf > now_s + leeway) || claims.iat.is_some_and(|iat| iat > now_s + leeway) {
            return Err(BadJwt::Future);
        }
        let user = claims.sub.and_then(|sub| sub.parse().ok()).ok_or(BadJwt::Subject)?;
        Ok(Person { user, email: claims.email.filter(|email| !email.is_empty()) })
    }
}

#[cfg(test)]
mod tests;
