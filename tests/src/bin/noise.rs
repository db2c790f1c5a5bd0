//! `noise SEED BYTES`: writes that much of the stream to stdout. The command of log tests.

use std::io::Write as _;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = || anyhow::Ok(args.next().ok_or_else(|| anyhow::anyhow!("usage: noise SEED BYTES"))?.parse()?);
    let (seed, len) = (number()?, number()?);
    let mut out = std::io::stdout().lock();
    for block in alloy_tests::noise::blocks(seed, len) {
        out.write_all(&block)?;
    }
    out.flush()?;
    Ok(())
}
