#!/bin/bash
# The worker talks to the guest agent. Without one an image is of little use: fail at once, not at the first job.
set -euo pipefail

if ! systemctl is-enabled --quiet tart-guest-agent; then
  echo "this base image starts no tart-guest-agent" >&2
  exit 1
fi
echo "guest agent: $(command -v tart-guest-agent)"
