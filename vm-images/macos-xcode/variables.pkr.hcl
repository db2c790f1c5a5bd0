variable "base_image" {
  description = "What to start from: a public image with guest agent, best by digest. Without xcode_xip it must have Xcode already."
  type        = string
  default     = "ghcr.io/cirruslabs/macos-tahoe-xcode:latest"
}

variable "vm_name" {
  description = "The local VM that is made."
  type        = string
  default     = "alloy-macos-xcode"
}

variable "cpu_count" {
  description = "Cores while it is built and of every VM cloned from it, unless the worker says otherwise. Below 4 macOS freezes."
  type        = number
  default     = 4

  validation {
    condition     = var.cpu_count >= 4
    error_message = "A macOS guest needs 4 cores at least."
  }
}

variable "memory_gb" {
  description = "Memory, likewise."
  type        = number
  default     = 8
}

variable "disk_size_gb" {
  description = "The virtual disk; never smaller than the base image's. Only what is written takes room on the host."
  type        = number
  default     = 140
}

variable "xcode_xip" {
  description = "Absolute path of an Xcode_….xip on this Mac, from developer.apple.com. Empty: keep the Xcode of the base image."
  type        = string
  default     = ""

  validation {
    condition     = var.xcode_xip == "" || substr(var.xcode_xip, 0, 1) == "/"
    error_message = "The path of the xip must be absolute."
  }
}

variable "platforms" {
  description = "Simulator runtimes to download for the selected Xcode: iOS, watchOS, tvOS, visionOS."
  type        = list(string)
  default     = ["iOS"]
}

variable "rosetta" {
  description = "Make sure that programs for Intel run."
  type        = bool
  default     = false
}

variable "ssh_public_key" {
  description = "One line of a public key: who has its private half may log in as admin by SSH. Empty: nobody may, SSH is off."
  type        = string
  default     = ""
}

variable "base_password" {
  description = "The password of the user admin in the base image. The image made has another one, which nobody knows."
  type        = string
  default     = "admin"
  sensitive   = true
}
