//! D: what may become a job: a spec that makes sense anywhere, within this farm's limits.

use alloy_shared::id::Labels;
use alloy_shared::limits::Limits;
use alloy_shared::wire::FieldError;
use alloy_shared::wire::job::JobSpec;
use alloy_shared::wire::spec::{FAULTS_MAX, check};

/// Checks a spec and returns the labels that it requires.
pub fn admit(spec: &JobSpec, limits: &Limits) -> Result<Labels, Vec<FieldError>> {
    let (labels, mut faults) = match check(spec) {
        Ok(labels) => (labels, Vec::new()),
        Err(faults) => (Labels::default(), faults),
    };
    for (field, value, max) in [
        ("timeout_ms", spec.timeout_ms, limits.job_timeout_max_ms),
        ("queue_timeout_ms", spec.queue_timeout_ms, limits.queue_timeout_max_ms()),
    ] {
        if let Some(ms) = value.filter(|ms| *ms > max) {
            let message = format!("is {ms}, at most {max} ms are allowed");
            faults.push(FieldError { field: field.to_owned(), message });
        }
    }
    faults.truncate(FAULTS_MAX);
    if faults.is_empty() { Ok(labels) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_farms_own_limits_are_told_beside_the_common_faults() {
        let spec = JobSpec {
            argv: vec![String::new()],
            timeout_ms: Some(1 << 60),
            queue_timeout_ms: Some(1 << 60),
            ..JobSpec::default()
        };
        let faults = admit(&spec, &Limits::default()).unwrap_err();
        let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
        assert_eq!(fields, ["argv[0]", "timeout_ms", "queue_timeout_ms"]);
        let spec = JobSpec { argv: vec!["make".into()], timeout_ms: Some(1), ..JobSpec::default() };
        assert!(admit(&spec, &Limits::default()).is_ok());
    }
}
