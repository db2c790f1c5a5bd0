//! `noise SEED BYTES`: writes that much of the stream to stdout. `noise tell STEP…`: what a job of the chaos tests does.

use std::io::Write as _;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("tell", steps)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return alloy_tests::teller::tell(steps);
    }
    let mut args = args.into_iter();
    let mut number = || anyhow::Ok(args.next().ok_or_else(|| anyhow::anyhow!("usage: noise SEED BYTES"))?.parse()?);
    let (seed, len) = (number()?, number()?);
    let mut out = std::io::stdout().lock();
    for block in alloy_tests::noise::blocks(seed, len) {
        out.write_all(&block)?;
    }
    out.flush()?;
    Ok(())
}
