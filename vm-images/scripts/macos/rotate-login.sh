#!/bin/bash
# Takes the public password away: the user gets a random one that is written down nowhere but where automatic login needs
# it, and SSH takes a key or nothing. Sudo asks for no password before and after, which the guest's owner (the job) may use.
set -euo pipefail

user=$(id -un)
new=$(openssl rand -hex 24)
kcpassword=${KCPASSWORD:-/etc/kcpassword}
sshd=${SSHD_CONFIG_DIR:-/etc/ssh/sshd_config.d}

# The keychain first: it opens with the password of the login, and without it no VM of this image can use it.
keychain=$HOME/Library/Keychains/login.keychain-db
security set-keychain-password -o "$OLD_PASSWORD" -p "$new" "$keychain"
security unlock-keychain -p "$new" "$keychain"
security set-keychain-settings "$keychain"
sudo dscl . -passwd "/Users/$user" "$OLD_PASSWORD" "$new"
dscl . -authonly "$user" "$new"
if dscl . -authonly "$user" "$OLD_PASSWORD" 2>/dev/null; then
  echo "the old password still opens the account" >&2
  exit 1
fi

# Automatic login reads the password from a file that hides it by a constant. The system's own command reports success
# over SSH without having written it.
umask 077
NEW=$new perl -e '
  my @mask = (0x7d, 0x89, 0x52, 0x23, 0xd2, 0xbc, 0xdd, 0xea, 0xa3, 0xb9, 0x1f);
  my $text = $ENV{NEW} . "\0" x (12 - length($ENV{NEW}) % 12);
  my $at = 0;
  binmode STDOUT;
  print join "", map { chr(ord($_) ^ $mask[$at++ % 11]) } split //, $text;
' | sudo tee "$kcpassword" >/dev/null
sudo chown root:wheel "$kcpassword"
sudo chmod 600 "$kcpassword"
sudo defaults write /Library/Preferences/com.apple.loginwindow autoLoginUser "$user"

who=nobody
if [ -n "$SSH_PUBLIC_KEY" ]; then
  who="the given key"
  mkdir -p "$HOME/.ssh"
  printf '%s\n' "$SSH_PUBLIC_KEY" >"$HOME/.ssh/authorized_keys"
  chmod 700 "$HOME/.ssh"
  chmod 600 "$HOME/.ssh/authorized_keys"
else
  # From the next boot on. The connection of this build stays.
  sudo launchctl disable system/com.openssh.sshd
fi
sudo launchctl disable system/com.apple.screensharing
printf 'PasswordAuthentication no\nKbdInteractiveAuthentication no\n' | sudo tee "$sshd/010-alloy.conf" >/dev/null
sudo chmod 644 "$sshd/010-alloy.conf"
echo "the password of $user is a new one; by SSH comes $who"
