//! `cargo model`: explores the models of the farm's protocol, and their mutants.

use alloy_tests::model::mutant::Mutant;
use alloy_tests::model::outage::Outage;
use alloy_tests::model::protocol::Bound;
use alloy_tests::model::run;

const USAGE: &str = "usage: cargo model [--bound small|large] [--steps MAX] [--mutant NAME | --all]";

fn main() -> anyhow::Result<()> {
    let (mut bound, mut changes, mut steps_max, mut mutants) = (Bound::SMALL, Outage::SMALL, None, Vec::new());
    let mut alone = true;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| anyhow::anyhow!(USAGE));
        match arg.as_str() {
            "--bound" => match value()?.as_str() {
                "small" => {}
                "large" => (bound, changes) = (Bound::LARGE, Outage::LARGE),
                _ => anyhow::bail!(USAGE),
            },
            "--steps" => steps_max = Some(value()?.parse()?),
            "--mutant" => {
                let name = value()?;
                let known = Mutant::all().find(|mutant| mutant.name() == name);
                let names = || Mutant::all().map(Mutant::name).collect::<Vec<_>>().join(", ");
                mutants.push(known.ok_or_else(|| anyhow::anyhow!("no mutant `{name}`; there are {}", names()))?);
                alone = false;
            }
            "--all" => mutants.extend(Mutant::all()),
            _ => anyhow::bail!(USAGE),
        }
    }
    let mut good = true;
    if alone {
        for (name, report) in [("outage", run::outage(changes)), ("protocol", run::protocol(bound, steps_max))] {
            print!("{name}: {report}");
            good &= report.is_good();
        }
    }
    for mutant in mutants {
        let report = run::mutant(mutant);
        let (name, check, states) = (mutant.name(), mutant.caught_by(), report.states);
        match report.trace(mutant) {
            Some(trace) => println!("{name}: caught after {} steps and {states} states by \"{check}\"", trace.len()),
            None => println!("{name}: NOT CAUGHT by \"{check}\" in {states} states"),
        }
        good &= report.trace(mutant).is_some();
        if !alone {
            report.trace(mutant).into_iter().flatten().for_each(|action| println!("    {action}"));
        }
    }
    anyhow::ensure!(good, "the models do not hold");
    Ok(())
}
