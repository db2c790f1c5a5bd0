#!/bin/bash
# Xcode: from an archive on the host, or the one that is there. Licence agreed, first launch done, runtimes loaded.
set -euo pipefail

if [ -n "$XCODE_XIP" ]; then
  work=$HOME/xcode-install
  mkdir "$work"
  cd "$work"
  # Checks Apple's signature while it unpacks.
  xip --expand "$XCODE_XIP"
  apps=(Xcode*.app)
  if [ ${#apps[@]} -ne 1 ] || [ ! -d "${apps[0]}" ]; then
    echo "$XCODE_XIP holds no single Xcode: ${apps[*]}" >&2
    exit 1
  fi
  sudo rm -rf /Applications/Xcode.app
  sudo mv "${apps[0]}" /Applications/Xcode.app
  cd "$HOME"
  rmdir "$work"
  sudo xcode-select --switch /Applications/Xcode.app
fi
sudo xcodebuild -license accept
sudo xcodebuild -runFirstLaunch
for platform in $PLATFORMS; do
  xcodebuild -downloadPlatform "$platform"
done
xcodebuild -version
xcrun simctl list runtimes
