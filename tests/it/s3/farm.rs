//! Farms of real processes that keep their bytes in a bucket.

use std::fs;

use alloy_shared::id::Digest;
use alloy_tests::farm::{Farm, Setup, isolated_orchestrator, output};
use alloy_tests::s3::{BUCKET, S3};
use anyhow::{Context as _, Result, ensure};
use reqwest::redirect::Policy;

async fn farm_on(s3: &S3, more: &[(&str, &str)]) -> Result<Farm> {
    let mut env = s3.env("farms/one");
    env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Farm::start(Setup { orchestrator_env: env, ..Setup::default() }).await
}

/// Runs a job that gives back what it got, twice over, and returns its id.
async fn run(farm: &Farm, len: usize) -> Result<(String, Vec<u8>)> {
    let tree = farm.scratch("tree")?;
    let bytes = super::noise(len, 4);
    fs::write(tree.join("input"), &bytes)?;
    let mut run = farm.alloy(&["run", "--json", "--artifact", "out/*", "-c", "mkdir out; cat input input > out/twice"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    ensure!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let page = farm.api().get("/v1/jobs").await?;
    let id = page["jobs"][0]["id"].as_str().context("an id")?.to_owned();
    let twice = fs::read(tree.join("alloy-out").join(&id).join("out/twice"))?;
    ensure!(twice == [bytes.clone(), bytes].concat(), "{} bytes came back", twice.len());
    Ok((id, twice))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_on_a_bucket_runs_a_job_from_its_source_to_its_artifact() -> Result<()> {
    let s3 = S3::start().await?;
    let mut farm = farm_on(&s3, &[]).await?;
    // Twice that is more than one part.
    let (_, twice) = run(&farm, 5 << 20).await?;
    let objects = s3.objects()?;
    let holds =
        |part: &str| objects.iter().filter(|(key, _)| key.starts_with("farms/one/") && key.contains(part)).count();
    assert_eq!((holds("/artifacts/"), holds("/manifests/"), holds("/packs/")), (1, 1, 1), "{:?}", names(&objects));
    let artifact = objects.iter().find(|(key, _)| key.ends_with(&Digest::of(&twice).to_string()));
    ensure!(artifact.context("the artifact")?.1 == twice);
    assert!(objects.iter().all(|(key, _)| !key.contains("probe")), "{:?}", names(&objects));
    assert!(!farm.farm_dir().join("blobs").exists());

    let target = farm.dir().join("backup").display().to_string();
    let out = output(farm.alloy(&["admin", "backup", &target])).await?;
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && told.contains(&format!("lie in s3://{BUCKET}/farms/one")), "{told}");

    farm.stop_orchestrator()?;
    let data = farm.dir().join("data");
    let out = output(isolated_orchestrator(farm.dir(), &data)).await?;
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && told.contains("ALLOY_S3_URL is not set"), "{told}");

    let mut other = isolated_orchestrator(farm.dir(), &farm.dir().join("other"));
    other.envs(s3.env("farms/one"));
    let out = output(other).await?;
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    let says = format!("s3://{BUCKET}/farms/one holds the objects of another farm");
    ensure!(!out.status.success() && told.contains(&says) && told.contains("s3://BUCKET/PREFIX"), "{told}");
    ensure!(!farm.dir().join("other/farm/blobs.place").exists(), "it is free to go elsewhere");
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    Ok(())
}

fn names(objects: &[(String, Vec<u8>)]) -> Vec<&String> {
    objects.iter().map(|(key, _)| key).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_cannot_be_used_is_told_at_the_start() -> Result<()> {
    let s3 = S3::start().await?;
    let dir = tempfile::tempdir()?;
    fs::create_dir(dir.path().join("home"))?;
    // The system gives this one to nobody.
    let closed = "http://127.0.0.1:9";
    let cases: [(&str, &str, &[&str]); 7] = [
        ("AWS_SECRET_ACCESS_KEY", "wrong", &["AWS_SECRET_ACCESS_KEY are not a pair", "SignatureDoesNotMatch"]),
        ("AWS_ACCESS_KEY_ID", "WRONG", &["AWS_ACCESS_KEY_ID and", "403 NotSignedUp"]),
        ("ALLOY_S3_URL", "s3://nobodys/x", &["s3://nobodys/x", "NoSuchBucket", "make the bucket"]),
        ("ALLOY_S3_ENDPOINT", closed, &["ALLOY_S3_ENDPOINT", "list its objects", "refused"]),
        ("ALLOY_S3_ENDPOINT", "http://10.1.2.3:9000", &["s3_endpoint (environment ALLOY_S3_ENDPOINT)", "use https"]),
        ("ALLOY_S3_URL", "bucket", &["s3_url (environment ALLOY_S3_URL)", "s3://bucket/prefix"]),
        ("AWS_SECRET_ACCESS_KEY", "", &["aws_secret_access_key", "is missing"]),
    ];
    for (number, (name, value, says)) in cases.into_iter().enumerate() {
        let mut command = isolated_orchestrator(dir.path(), &dir.path().join(number.to_string()));
        command.envs(s3.env("x")).env(name, value);
        let out = output(command).await?;
        let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(!out.status.success(), "{name}={value}: {told}");
        assert!(says.iter().all(|says| told.contains(says)), "{name}={value}: {told}");
        assert!(!told.contains(alloy_tests::s3::SECRET) && !told.contains("listening"), "{told}");
    }
    assert!(s3.objects()?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_is_fetched_from_the_bucket_itself_if_that_is_wanted() -> Result<()> {
    let s3 = S3::start().await?;
    let farm = farm_on(&s3, &[("ALLOY_S3_PRESIGN", "true")]).await?;
    // The download that ends `alloy run` goes through a link too.
    let (id, twice) = run(&farm, 300_000).await?;
    let http = reqwest::Client::builder().redirect(Policy::none()).no_proxy().build()?;
    let url = format!("{}/v1/jobs/{id}/artifacts/out/twice", farm.url());
    let answer = http.get(&url).bearer_auth(farm.token()).send().await?;
    assert_eq!(answer.status(), 307);
    let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    assert_eq!((header("etag"), header("cache-control")), (&*format!("\"{}\"", Digest::of(&twice)), "no-store"));
    let link = header("location").to_owned();
    assert!(link.starts_with(&format!("{}/{BUCKET}/farms/one/", s3.endpoint())), "{link}");
    assert_eq!(http.get(&url).send().await?.status(), 401, "a link is given to whoever may read the job");

    let direct = http.get(&link).send().await?;
    assert_eq!(direct.status(), 200);
    ensure!(direct.bytes().await? == twice);
    let other = link.replace("twice", "once").replacen("artifacts", "packs", 1);
    assert_eq!(http.get(&other).send().await?.status(), 403, "it opens one object");

    let dir = farm.scratch("fetched")?;
    let mut get = farm.alloy(&["artifacts", "get", &id, "--output"]);
    get.arg(&dir);
    let out = output(get).await?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    ensure!(fs::read(dir.join("out/twice"))? == twice);
    assert_eq!(s3.faults.farm_tokens(), 0, "no token of the farm reaches the store");
    Ok(())
}
