// SPDX-License-Identifier: Apache-2.0

// Command gen writes codes_gen.go from codes.yaml.
package main

import (
	"bytes"
	"fmt"
	"go/format"
	"os"

	"sigs.k8s.io/yaml"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "problem/gen:", err)
		os.Exit(1)
	}
}

func run() error {
	data, err := os.ReadFile("codes.yaml")
	if err != nil {
		return err
	}
	var rows []struct{ Code, Name, Title string }
	if err := yaml.Unmarshal(data, &rows); err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString("// SPDX-License-Identifier: Apache-2.0\n\n// Code generated from codes.yaml by gen; DO NOT EDIT.\n\npackage problem\n\n// The codes.\nconst (\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "\t%s Code = %q // %s\n", r.Name, r.Code, r.Title)
	}
	b.WriteString(")\n")
	out, err := format.Source(b.Bytes())
	if err != nil {
		return err
	}
	return os.WriteFile("codes_gen.go", out, 0o644)
}
