# A macOS image with Xcode for a farm of Macs. See ../README.md.

packer {
  required_version = ">= 1.9.0"
  required_plugins {
    tart = {
      source  = "github.com/cirruslabs/tart"
      version = "= 1.21.0"
    }
  }
}

locals {
  scripts = "${path.root}/../scripts/macos"
  # A share of the host's directory: 3 GB through it take seconds, through SSH minutes.
  xcode_share = var.xcode_xip == "" ? [] : ["--dir=xcode:${dirname(var.xcode_xip)}:ro"]
  xcode_xip   = var.xcode_xip == "" ? "" : "/Volumes/My Shared Files/xcode/${basename(var.xcode_xip)}"
}

source "tart-cli" "macos_xcode" {
  vm_base_name   = var.base_image
  vm_name        = var.vm_name
  cpu_count      = var.cpu_count
  memory_gb      = var.memory_gb
  disk_size_gb   = var.disk_size_gb
  headless       = true
  disable_vnc    = true
  run_extra_args = local.xcode_share
  ssh_username   = "admin"
  ssh_password   = var.base_password
  ssh_timeout    = "300s"
}

build {
  sources = ["source.tart-cli.macos_xcode"]

  provisioner "shell" {
    scripts = [
      "${local.scripts}/guest-agent.sh",
      "${local.scripts}/quiet.sh",
    ]
  }

  provisioner "shell" {
    environment_vars = ["ROSETTA=${var.rosetta}"]
    script           = "${local.scripts}/rosetta.sh"
  }

  provisioner "shell" {
    environment_vars = [
      "XCODE_XIP=${local.xcode_xip}",
      "PLATFORMS=${join(" ", var.platforms)}",
    ]
    script = "${local.scripts}/xcode.sh"
  }

  provisioner "shell" {
    scripts = [
      "${local.scripts}/simulators.sh",
      "${local.scripts}/clean.sh",
    ]
  }

  # The last one: after it nobody logs in with a password.
  provisioner "shell" {
    environment_vars = [
      "OLD_PASSWORD=${var.base_password}",
      "SSH_PUBLIC_KEY=${var.ssh_public_key}",
    ]
    script = "${local.scripts}/rotate-login.sh"
  }
}
