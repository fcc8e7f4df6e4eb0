package api

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// metrics tells of the facts in Prometheus' form. What it says is read from the View at each scrape, so it is always what status says.
type metrics struct {
	http.Handler
	backend  Backend
	requests *prometheus.CounterVec
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("gitopsd_"+name, help, labels, nil)
}

var (
	descIndex  = desc("log_index", "Index of the last log entry that this node applied.")
	descTerm   = desc("log_term", "Term of the last log entry that this node applied.")
	descStacks = desc("stacks", "Stacks by sync status and health.", "sync", "health")
	descStack  = desc("stack_status", "What is true of a stack, in the words of `gitopsctl status`: always 1.",
		"stack", "source", "sync", "health", "outcome", "reason")
	descReady    = desc("stack_ready", "1 if the stack is Synced and Healthy, else 0.", "stack")
	descOutcomes = desc("stack_outcomes", "Remembered outcomes of a stack's revisions, by kind.", "stack", "outcome")
	descTasks    = desc("tasks", "Tasks by phase and health, as their nodes reported.", "stack", "service", "phase", "health")
	descDesired  = desc("service_tasks_desired", "Tasks that there should be.", "stack", "service")
	descDoing    = desc("service_tasks_ready", "Tasks that do their work.", "stack", "service")
	descFailures = desc("service_task_failures", "Failures of the tasks that there are: ends and failed health checks since each was made.",
		"stack", "service")
	descDrifted = desc("service_tasks_drifted", "Tasks that are not as they should be, and were not healed.", "stack", "service")
	descSource  = desc("source_status", "What is true of a source: always 1.", "source", "state", "reason")
	descFacts   = desc("objects", "Objects that the log holds, by kind.", "kind")
)

func newMetrics(c Config) *metrics {
	m := &metrics{backend: c.Backend, requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gitopsd_api_requests_total", Help: "Requests on the socket, by route and HTTP status.",
	}, []string{"route", "code"})}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "gitopsd_build_info", Help: "Version of the daemon: always 1.",
	}, []string{"version", "node"})
	build.WithLabelValues(c.Version, c.Node).Set(1)
	reg := prometheus.NewRegistry()
	reg.MustRegister(m, m.requests, build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if c.Rendered != nil {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "gitopsd_stacks_rendered_total", Help: "Stacks that were rendered: what did not change is not.",
		}, func() float64 { return float64(c.Rendered()) }))
	}
	m.Handler = promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
	return m
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descIndex, descTerm, descStacks, descStack, descReady, descOutcomes, descTasks, descDesired,
		descDoing, descFailures, descDrifted, descSource, descFacts} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	v := m.backend.View()
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	ch <- prometheus.MustNewConstMetric(descIndex, prometheus.GaugeValue, float64(v.Index))
	ch <- prometheus.MustNewConstMetric(descTerm, prometheus.GaugeValue, float64(v.Term))
	stacks := map[[2]string]int{}
	for _, st := range reconcile.Statuses(v) {
		stacks[[2]string{string(st.Sync), string(st.Health)}]++
		collectStack(v, st, gauge)
	}
	for k, n := range stacks {
		gauge(descStacks, n, k[0], k[1])
	}
	for _, s := range sourcesOf(v) {
		reason := ""
		if s.Trouble != nil {
			reason = s.Trouble.ID
		} else if len(s.Waiting) > 0 {
			reason = s.Waiting[0].ID
		}
		gauge(descSource, 1, s.Name, s.State, reason)
	}
	for kind, n := range map[string]int{"stacks": v.Stacks.Len(), "services": v.Services.Len(), "tasks": v.Tasks.Len(), "sources": v.Sources.Len(),
		"volumes": v.Volumes.Len(), "secrets": v.Secrets.Len(), "nodes": v.Nodes.Len(), "networks": v.Networks.Len(), "events": v.Events.Len()} {
		gauge(descFacts, n, kind)
	}
}

func collectStack(v *state.View, st reconcile.StackStatus, gauge func(*prometheus.Desc, int, ...string)) {
	reason, ready := "", 0
	if len(st.Reasons) > 0 {
		reason = st.Reasons[0].ID
	}
	if st.Ready {
		ready = 1
	}
	gauge(descStack, 1, st.Name, st.Source, string(st.Sync), string(st.Health), string(st.Outcome.Kind), reason)
	gauge(descReady, ready, st.Name)
	outcomes := map[state.OutcomeKind]int{}
	if h, err := historyOf(v, st.Name); err == nil {
		for _, o := range h.Outcomes {
			outcomes[o.Kind]++
		}
	}
	for kind, n := range outcomes {
		if kind != "" {
			gauge(descOutcomes, n, st.Name, string(kind))
		}
	}
	for _, svc := range st.Services {
		gauge(descDesired, svc.Desired, st.Name, svc.Name)
		gauge(descDoing, svc.Ready, st.Name, svc.Name)
		tasks := map[[2]string]int{}
		failures, drifted := 0, 0
		for _, t := range svc.Tasks {
			phase := string(t.Report.Phase)
			if phase == "" {
				phase = "pending"
			}
			tasks[[2]string{phase, string(t.Report.Health)}]++
			failures += t.Report.Failures
			drifted += min(1, len(t.Report.Drift))
		}
		for k, n := range tasks {
			gauge(descTasks, n, st.Name, svc.Name, k[0], k[1])
		}
		gauge(descFailures, failures, st.Name, svc.Name)
		gauge(descDrifted, drifted, st.Name, svc.Name)
	}
}
