// SPDX-License-Identifier: Apache-2.0

package bundleendpoint

// CheckAddress is what the dialler asks.
var CheckAddress = checkAddress
