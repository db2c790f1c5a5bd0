#!/bin/bash
# Programs for Intel, if wanted. A base image that has Rosetta keeps it.
set -euo pipefail

if [ "$ROSETTA" != true ]; then
  echo "Rosetta was not asked for"
  exit 0
fi
if ! /usr/bin/arch -x86_64 /usr/bin/true 2>/dev/null; then
  sudo softwareupdate --install-rosetta --agree-to-license
fi
/usr/bin/arch -x86_64 /usr/bin/true
