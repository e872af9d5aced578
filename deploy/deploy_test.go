// SPDX-License-Identifier: Apache-2.0

package deploy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// unit is a parsed systemd unit: section, key, values in their order.
type unit map[string]map[string][]string

func parse(t *testing.T, name string) unit {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	u, section := unit{}, ""
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		switch key, value, ok := strings.Cut(line, "="); {
		case line == "" || line[0] == '#':
		case line[0] == '[' && line[len(line)-1] == ']':
			section = line[1 : len(line)-1]
			u[section] = map[string][]string{}
		case !ok || section == "" || strings.TrimSpace(key) != key:
			t.Fatalf("%s:%d: %q is neither a section nor KEY=VALUE", name, i+1, line)
		default:
			u[section][key] = append(u[section][key], value)
		}
	}
	return u
}

// hardening is what every unit says, whatever its role.
var hardening = map[string]string{
	"DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes",
	"ProtectClock": "yes", "ProtectControlGroups": "yes", "ProtectHostname": "yes", "ProtectKernelLogs": "yes", "ProtectKernelModules": "yes",
	"ProtectKernelTunables": "yes", "ProtectProc": "invisible", "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX", "RestrictNamespaces": "yes",
	"RestrictRealtime": "yes", "RestrictSUIDSGID": "yes", "LockPersonality": "yes", "MemoryDenyWriteExecute": "yes", "SystemCallArchitectures": "native",
	"SystemCallFilter": "@system-service|~@privileged @resources", "UMask": "0077", "StateDirectoryMode": "0700", "Restart": "always",
}

func TestUnits(t *testing.T) {
	names, err := filepath.Glob("*.service")
	if err != nil || len(names) != 3 {
		t.Fatalf("units %q, %v: want three", names, err)
	}
	for _, name := range names {
		u := parse(t, name)
		s := u["Service"]
		for key, want := range hardening {
			if got := strings.Join(s[key], "|"); got != want {
				t.Errorf("%s: %s=%s, want %s", name, key, got, want)
			}
		}
		for section, key := range map[string]string{"Unit": "Description", "Install": "WantedBy"} {
			if len(u[section][key]) != 1 {
				t.Errorf("%s: [%s] has no %s", name, section, key)
			}
		}
		for key, values := range s {
			if len(values) > 1 && key != "SystemCallFilter" {
				t.Errorf("%s: %s stands %d times", name, key, len(values))
			}
		}
		caps := strings.Join(s["CapabilityBoundingSet"], "|")
		if caps != "" && caps != "CAP_NET_BIND_SERVICE" {
			t.Errorf("%s: capabilities %s", name, caps)
		}
		testCommand(t, name, s)
	}
}

var roleFlag = regexp.MustCompile(`name:"([a-z-]+)"(?: default:"([^"]*)")?`)

// settings are the flags of a role with their defaults, read from its source.
func settings(t *testing.T, file string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flags := map[string]string{}
	for _, m := range roleFlag.FindAllStringSubmatch(string(data), -1) {
		flags[m[1]] = m[2]
	}
	return flags
}

// testCommand: the command is a role of ours, with flags that it has, its state in the unit's directory, its secret a credential,
// and more time to stop than it drains.
func testCommand(t *testing.T, name string, s map[string][]string) {
	role := strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(name, "strait-"), ".service"), "@")
	binary, file := "/usr/bin/strait-proxy", filepath.Join("..", "cmd", "strait-proxy", "role", role+".go")
	if role == "controlplane" {
		binary, file = "/usr/bin/strait", filepath.Join("..", "cmd", "strait", "cli", "controlplane.go")
	}
	words := strings.Fields(strings.Join(s["ExecStart"], "|"))
	if len(words) < 4 || words[0] != binary || words[1] != role || words[2] != "--data-dir" || words[3] != "${STATE_DIRECTORY}" {
		t.Fatalf("%s: ExecStart=%q", name, words)
	}
	flags := settings(t, file)
	for i := 2; i < len(words); i += 2 {
		if _, ok := flags[strings.TrimPrefix(words[i], "--")]; !ok {
			t.Errorf("%s: %s has no flag %s", name, role, words[i])
		}
		if strings.Contains(words[i+1], "token") && !strings.HasPrefix(words[i+1], "${CREDENTIALS_DIRECTORY}/") {
			t.Errorf("%s: the token %s is no credential", name, words[i+1])
		}
	}
	var drain time.Duration
	for _, f := range []string{"drain-delay", "drain-grace"} {
		if d, err := time.ParseDuration(flags[f]); err == nil {
			drain += d
		}
	}
	stop, err := time.ParseDuration(strings.Join(s["TimeoutStopSec"], "|"))
	if err != nil || stop < drain+10*time.Second {
		t.Errorf("%s: TimeoutStopSec=%q (%v), the role drains for %s", name, s["TimeoutStopSec"], err, drain)
	}
}
