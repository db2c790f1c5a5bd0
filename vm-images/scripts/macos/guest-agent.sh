#!/bin/bash
# The worker talks to the guest agent. Without one an image is of little use: fail at once, not at the first job.
set -euo pipefail

agent=$(PATH="/opt/homebrew/bin:/usr/local/bin:$PATH" command -v tart-guest-agent) || {
  echo "this base image has no tart-guest-agent; start from a -base or -xcode image, not from -vanilla" >&2
  exit 1
}
plists=("${LAUNCH_AGENTS:-/Library/LaunchAgents}"/*tart-guest-agent*.plist)
if [ ! -e "${plists[0]}" ]; then
  echo "$agent is installed, but no LaunchAgent starts it at login" >&2
  exit 1
fi
echo "guest agent: $agent, started by ${plists[0]}"
