// SPDX-License-Identifier: Apache-2.0

package jwtsvid

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// readJSON reads one JSON object. Names that stand twice anywhere, ill-formed UTF-8, what follows the object and nesting beyond
// maxDepth are refused: two readers could make two tokens of it.
func readJSON(data []byte) (map[string]any, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("no UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	v, err := readValue(dec, 0)
	if err != nil {
		return nil, fmt.Errorf("no JSON object: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something after the JSON object")
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("no JSON object")
	}
	return m, nil
}

func readValue(dec *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested more than %d deep", maxDepth)
	}
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('{'):
		m := map[string]any{}
		for dec.More() {
			t, err := dec.Token()
			if err != nil {
				return nil, err
			}
			name, _ := t.(string)
			if _, ok := m[name]; ok {
				return nil, fmt.Errorf("%.20q stands twice", name)
			}
			if m[name], err = readValue(dec, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := dec.Token()
		return m, err
	case json.Delim('['):
		list := []any{}
		for dec.More() {
			v, err := readValue(dec, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := dec.Token()
		return list, err
	}
	return t, nil
}
