//! `bench`: measures Alloy beside its peers and writes `bench.json` and `bench.md`. Build everything with `--release` first.

use alloy_tests::bench::{Options, default_out, run};
use anyhow::{Context as _, Result, bail};

const HELP: &str = "bench [--rounds N] [--quick] [--only hello|log|desk|queue|submit|idle|warm] [--out DIR]";

#[tokio::main]
async fn main() -> Result<()> {
    let mut options = Options { rounds: 5, quick: false, out: default_out(), only: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value: {HELP}"));
        match arg.as_str() {
            "--rounds" => options.rounds = value()?.parse()?,
            "--quick" => options.quick = true,
            "--only" => options.only = Some(value()?),
            "--out" => options.out = value()?.into(),
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(());
            }
            _ => bail!("unknown argument `{arg}`: {HELP}"),
        }
    }
    let report = run(&options).await?;
    println!("{}\nwritten to {}", report.markdown(), options.out.display());
    Ok(())
}
