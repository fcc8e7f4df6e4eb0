# METADATA
# title: A rule
package custom.rule

deny contains "x" if http.send({"method": "get", "url": "http://localhost"}).status_code == 200
