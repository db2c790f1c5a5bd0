#!/bin/bash
# Switches off what works in the background: a job has all of its VM, and no timer holds the lock of apt.
set -euo pipefail

sudo systemctl disable --now apt-daily.timer apt-daily-upgrade.timer
if systemctl cat unattended-upgrades.service >/dev/null 2>&1; then
  sudo systemctl disable --now unattended-upgrades.service
fi
sudo systemctl mask man-db.timer
