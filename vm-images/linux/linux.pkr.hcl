# A Linux guest image (arm64). See ../README.md.

packer {
  required_version = ">= 1.9.0"
  required_plugins {
    tart = {
      source  = "github.com/cirruslabs/tart"
      version = "= 1.21.0"
    }
  }
}

variable "base_image" {
  description = "What to start from: a public Debian or Ubuntu image with guest agent, best by digest."
  type        = string
  default     = "ghcr.io/cirruslabs/ubuntu:latest"
}

variable "vm_name" {
  description = "The local VM that is made."
  type        = string
  default     = "alloy-linux"
}

variable "cpu_count" {
  description = "Cores while it is built and of every VM cloned from it, unless the worker says otherwise."
  type        = number
  default     = 4
}

variable "memory_gb" {
  description = "Memory, likewise."
  type        = number
  default     = 4
}

variable "disk_size_gb" {
  description = "The virtual disk; never smaller than the base image's. Only what is written takes room on the host."
  type        = number
  default     = 40
}

variable "packages" {
  description = "Debian packages that jobs need, beyond a C compiler and git."
  type        = list(string)
  default     = []
}

variable "ssh_public_key" {
  description = "One line of a public key: who has its private half may log in as admin by SSH. Empty: nobody may, SSH is off."
  type        = string
  default     = ""
}

variable "base_password" {
  description = "The password of the user admin in the base image. In the image made the user has none."
  type        = string
  default     = "admin"
  sensitive   = true
}

locals {
  scripts = "${path.root}/../scripts/linux"
}

source "tart-cli" "linux" {
  vm_base_name = var.base_image
  vm_name      = var.vm_name
  cpu_count    = var.cpu_count
  memory_gb    = var.memory_gb
  disk_size_gb = var.disk_size_gb
  headless     = true
  disable_vnc  = true
  ssh_username = "admin"
  ssh_password = var.base_password
  ssh_timeout  = "180s"
}

build {
  sources = ["source.tart-cli.linux"]

  provisioner "shell" {
    scripts = [
      "${local.scripts}/guest-agent.sh",
      "${local.scripts}/quiet.sh",
    ]
  }

  provisioner "shell" {
    environment_vars = ["PACKAGES=${join(" ", var.packages)}"]
    script           = "${local.scripts}/packages.sh"
  }

  # The last one: after it nobody logs in with a password.
  provisioner "shell" {
    environment_vars = ["SSH_PUBLIC_KEY=${var.ssh_public_key}"]
    script           = "${local.scripts}/rotate-login.sh"
  }
}
