#!/bin/bash
# What nearly every job needs, and what was asked for.
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
read -r -a wanted <<<"$PACKAGES"
sudo apt-get update -q
sudo --preserve-env=DEBIAN_FRONTEND apt-get install -q -y --no-install-recommends \
  build-essential ca-certificates curl git jq unzip zstd "${wanted[@]}"
sudo apt-get clean
