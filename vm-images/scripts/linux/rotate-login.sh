#!/bin/bash
# Takes the public password away: the user has none, and SSH takes a key or nothing. Sudo asks for no password before and
# after, which the guest's owner (the job) may use. Clones get an identity of their own.
set -euo pipefail

user=$(id -un)
sshd=${SSHD_CONFIG_DIR:-/etc/ssh/sshd_config.d}
machine_id=${MACHINE_ID:-/etc/machine-id}

sudo usermod --password '*' "$user"
if [ -n "$SSH_PUBLIC_KEY" ]; then
  mkdir -p "$HOME/.ssh"
  printf '%s\n' "$SSH_PUBLIC_KEY" >"$HOME/.ssh/authorized_keys"
  chmod 700 "$HOME/.ssh"
  chmod 600 "$HOME/.ssh/authorized_keys"
else
  # From the next boot on. The connection of this build stays.
  for unit in ssh.socket ssh.service; do
    if systemctl cat "$unit" >/dev/null 2>&1; then
      sudo systemctl disable "$unit"
    fi
  done
fi
printf 'PasswordAuthentication no\nKbdInteractiveAuthentication no\n' | sudo tee "$sshd/010-alloy.conf" >/dev/null
# Made anew at the first boot of each clone: addresses are leased by it.
sudo truncate --size 0 "$machine_id"
