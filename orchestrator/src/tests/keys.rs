//! Keys of a sign-in service, and tokens signed with them.

use std::process::Command;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use ring::{hmac, rsa};
use serde_json::{Value, json};

pub(crate) const SECRET: &str = "a shared secret of at least thirty-two bytes";
pub(crate) const ISSUER: &str = "https://project.test/auth/v1";
pub(crate) const USER: &str = "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11";

pub(crate) enum Signer {
    Hmac(Vec<u8>),
    Ec(Box<EcdsaKeyPair>),
    Rsa(Box<RsaKeyPair>),
}

impl Signer {
    pub(crate) fn secret(text: &str) -> Self {
        Self::Hmac(text.as_bytes().to_vec())
    }

    pub(crate) fn ec() -> Self {
        let (kind, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self::Ec(Box::new(EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).unwrap()))
    }

    /// Always the same one: making it takes a while.
    pub(crate) fn rsa() -> Self {
        static DER: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let args = ["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];
            let made = Command::new("openssl").args(args).output().expect("openssl is installed");
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let pem = String::from_utf8(made.stdout).unwrap();
            let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
            base64::engine::general_purpose::STANDARD.decode(body).unwrap()
        });
        Self::Rsa(Box::new(RsaKeyPair::from_pkcs8(&DER).unwrap()))
    }

    pub(crate) fn alg(&self) -> &'static str {
        match self {
            Self::Hmac(_) => "HS256",
            Self::Ec(_) => "ES256",
            Self::Rsa(_) => "RS256",
        }
    }

    /// The public half as JWKS has it.
    pub(crate) fn jwk(&self, kid: &str) -> Value {
        let text = |bytes: &[u8]| BASE64URL.encode(bytes);
        match self {
            Self::Hmac(secret) => json!({ "kty": "oct", "kid": kid, "alg": "HS256", "k": text(secret) }),
            Self::Ec(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256", "use": "sig", "key_ops": ["verify"], "x": text(x), "y": text(y) })
            }
            Self::Rsa(pair) => {
                let public: rsa::PublicKeyComponents<Vec<u8>> = pair.public().into();
                json!({ "kty": "RSA", "kid": kid, "alg": "RS256", "use": "sig", "n": text(&public.n), "e": text(&public.e) })
            }
        }
    }

    /// The public half as a file has it: what a confused verifier takes for an HMAC's secret.
    pub(crate) fn public(&self) -> Vec<u8> {
        match self {
            Self::Hmac(secret) => secret.clone(),
            Self::Ec(pair) => pair.public_key().as_ref().to_vec(),
            Self::Rsa(pair) => pair.public().as_ref().to_vec(),
        }
    }

    pub(crate) fn sign(&self, kid: &str, claims: &Value) -> String {
        self.sign_as(&json!({ "alg": self.alg(), "typ": "JWT", "kid": kid }), claims)
    }

    pub(crate) fn sign_as(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| BASE64URL.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let random = SystemRandom::new();
        let signature = match self {
            Self::Hmac(secret) => {
                hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes()).as_ref().to_vec()
            }
            Self::Ec(pair) => pair.sign(&random, signed.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Rsa(pair) => {
                let mut out = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, signed.as_bytes(), &mut out).unwrap();
                out
            }
        };
        format!("{signed}.{}", BASE64URL.encode(signature))
    }
}

/// What Supabase Auth writes into the token of somebody who has signed in.
pub(crate) fn claims(issuer: &str, now_s: i64) -> Value {
    json!({
        "iss": issuer, "sub": USER, "aud": "authenticated", "exp": now_s + 3_600, "iat": now_s, "role": "authenticated",
        "email": "ada@example.com", "phone": "", "aal": "aal1", "session_id": "0d1f", "is_anonymous": false,
        "app_metadata": { "provider": "email" }, "user_metadata": {}, "amr": [{ "method": "password", "timestamp": now_s }],
    })
}
