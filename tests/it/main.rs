//! The one integration binary. Names of tests are sentences about what a user sees.

/// Each of these behaviours is two tests: of jobs on the workers' own hosts, and of jobs in the VMs of simulated Macs.
macro_rules! on_every_provider {
    (@ $module:ident $provider:ident: $($name:ident)+) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() -> anyhow::Result<()> {
                    super::$name(alloy_tests::farm::Provider::$provider).await
                }
            )+
        }
    };
    ($($name:ident),+ $(,)?) => {
        on_every_provider!(@ on_hosts Host: $($name)+);
        on_every_provider!(@ in_vms Tart: $($name)+);
    };
}

mod access;
mod care;
mod chaos;
mod cli;
mod disk;
mod follow;
mod gc;
mod hooks;
mod image;
mod images;
mod job;
mod model;
mod moving;
mod orgs;
mod outage;
mod prose;
mod provider;
mod s3;
mod several;
mod shared;
mod store;
mod tart;
mod tidy;
mod vm;
mod wire;
mod worker;
