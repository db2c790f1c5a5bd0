//! `pg`: a Postgres for many test processes. It says where it is and ends with its stdin.

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    alloy_tests::pg::keep().await
}
