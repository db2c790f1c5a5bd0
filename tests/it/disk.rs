//! Disks that are full, that fail, and that lose their power.

/// Tests whose mounts nobody else sees.
macro_rules! with_own_mounts {
    ($($name:ident),+ $(,)?) => {
        mod apart {
            $(
                #[test]
                fn $name() -> anyhow::Result<()> {
                    alloy_tests::mount::alone(stringify!($name), super::$name())
                }
            )+
        }
    };
}

mod backup;
mod damage;
mod faults;
mod full;
mod power;
