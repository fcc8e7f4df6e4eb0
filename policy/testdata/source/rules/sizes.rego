# A library: it neither denies nor warns, so it needs no description.
package custom.sizes

bytes(text) := units.parse_bytes(text)
