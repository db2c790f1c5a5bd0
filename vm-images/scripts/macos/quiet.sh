#!/bin/bash
# Switches off what works in the background of a Mac: a job has all of its VM, and two runs are alike.
set -euo pipefail

# Spotlight: indexing starts with every clone otherwise.
sudo mdutil -a -i off
# Updates: none is looked for, none is loaded, none restarts a VM in the middle of a job.
sudo softwareupdate --schedule off
updates=/Library/Preferences/com.apple.SoftwareUpdate
for key in AutomaticCheckEnabled AutomaticDownload AutomaticallyInstallMacOSUpdates ConfigDataInstall CriticalUpdateInstall; do
  sudo defaults write "$updates" "$key" -bool false
done
sudo defaults write /Library/Preferences/com.apple.commerce AutoUpdate -bool false
# Sleep, screen saver, naps: a test that waits for a window must find it awake.
sudo pmset -a sleep 0 displaysleep 0 disksleep 0
defaults -currentHost write com.apple.screensaver idleTime 0
defaults write NSGlobalDomain NSAppSleepDisabled -bool true
# Windows of the last session, crash dialogs and first-run assistants would stand in front of the tests.
defaults write com.apple.loginwindow TALLogoutSavesState -bool false
defaults write com.apple.CrashReporter DialogType none
defaults write com.apple.SetupAssistant DidSeeCloudSetup -bool true
