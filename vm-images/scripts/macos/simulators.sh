#!/bin/bash
# Boots one simulator of every runtime once: the first boot migrates data for minutes, and a job should not pay for it.
set -euo pipefail

# Two columns: the runtime and its first device that can be used.
first_devices() {
  xcrun simctl list devices available --json |
    jq -r '.devices | to_entries[] | select(.value | length > 0) | "\(.key)\t\(.value[0].udid)"'
}

devices=$(first_devices)
if [ -z "$devices" ]; then
  echo "there is no simulator to boot; which platforms were asked for?" >&2
  exit 1
fi
while IFS=$'\t' read -r runtime device; do
  echo "first boot of $runtime"
  # Boots it if need be, and returns when it is ready.
  xcrun simctl bootstatus "$device" -b
  xcrun simctl shutdown "$device"
done <<<"$devices"
