/**
 * Draws one dashboard with the components of Grafana itself.
 *
 * Belongs here: what Grafana's own application does between a dashboard's JSON with its answers and these components:
 * the plugins' defaults, the grid, which component draws which type of panel. Does not: asking anybody
 * (`answers.py`), or what the panels are (`observability/dashboards.py`).
 *
 * The defaults are those of Grafana 11.6 (public/app/plugins/panel), whose plugins are in no package.
 */
import '@fontsource/inter/latin-400.css';
import '@fontsource/inter/latin-500.css';

import {
  applyFieldOverrides,
  createTheme,
  DashboardCursorSync,
  dateTime,
  EventBusSrv,
  FieldColorModeId,
  type DataFrame,
  type DataFrameDTO,
  type DataTransformerConfig,
  type FieldConfig,
  type FieldConfigPropertyItem,
  type FieldConfigSource,
  FieldConfigOptionsRegistry,
  type FieldDisplay,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
  type GrafanaTheme2,
  identityOverrideProcessor,
  standardTransformers,
  standardTransformersRegistry,
  ThemeContext,
  type ThresholdsConfig,
  ThresholdsMode,
  type TimeRange,
  toDataFrame,
  transformDataFrame,
} from '@grafana/data';
import { BarGaugeDisplayMode, BarGaugeNamePlacement, BarGaugeValueMode, LegendDisplayMode, TooltipDisplayMode, VizOrientation } from '@grafana/schema';
import {
  BarGauge,
  BigValue,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  GlobalStyles,
  PanelChrome,
  PanelContextProvider,
  Table,
  TimeSeries,
  TooltipPlugin,
  VizRepeater,
} from '@grafana/ui';
import { defaultsDeep, uniqBy } from 'lodash';
import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';

import arrowDown from './node_modules/@grafana/ui/dist/public/img/icons/unicons/arrow-down.svg';
import arrowUp from './node_modules/@grafana/ui/dist/public/img/icons/unicons/arrow-up.svg';
import infoCircle from './node_modules/@grafana/ui/dist/public/img/icons/unicons/info-circle.svg';

interface Panel {
  id: number;
  type: string;
  title: string;
  description?: string;
  gridPos: { x: number; y: number; w: number; h: number };
  fieldConfig: FieldConfigSource;
  options?: Record<string, any>;
  timeFrom?: string;
  transformations?: DataTransformerConfig[];
}

interface Page {
  dashboard: { title: string; description: string; panels: Panel[] };
  chosen: Array<[string, string]>;
  answers: Record<string, DataFrameDTO[]>;
  from: number;
  to: number;
  note: string;
}

const COLUMNS = 24;
const ROW = 30;
const GAP = 8;
const MARGIN = 16;

const PALETTE = { color: { mode: FieldColorModeId.PaletteClassic } };
const BY_THRESHOLD = { color: { mode: FieldColorModeId.Thresholds } };
const EVERY = {
  thresholds: { mode: ThresholdsMode.Absolute, steps: [{ value: -Infinity, color: 'green' }, { value: 80, color: 'red' }] },
  mappings: [],
};
const REDUCED = { reduceOptions: { calcs: ['lastNotNull'], values: false, fields: '' }, orientation: VizOrientation.Auto };

/** What a plugin fills in where a panel says nothing. */
const DEFAULTS: Record<string, { field: FieldConfig; options: Record<string, any> }> = {
  timeseries: {
    field: {
      ...PALETTE,
      ...EVERY,
      custom: {
        drawStyle: 'line',
        lineInterpolation: 'linear',
        lineWidth: 1,
        fillOpacity: 0,
        gradientMode: 'none',
        barAlignment: 0,
        stacking: { mode: 'none', group: 'A' },
        axisGridShow: true,
        axisCenteredZero: false,
        axisBorderShow: false,
        axisPlacement: 'auto',
        axisColorMode: 'text',
        showPoints: 'auto',
        pointSize: 5,
        spanNulls: false,
        scaleDistribution: { type: 'linear' },
        thresholdsStyle: { mode: 'off' },
      },
    },
    options: {
      legend: { displayMode: LegendDisplayMode.List, placement: 'bottom', showLegend: true, calcs: [] },
      tooltip: { mode: TooltipDisplayMode.Single, sort: 'none' },
    },
  },
  stat: {
    field: { ...BY_THRESHOLD, ...EVERY },
    options: {
      ...REDUCED,
      graphMode: BigValueGraphMode.Area,
      colorMode: BigValueColorMode.Value,
      justifyMode: BigValueJustifyMode.Auto,
      textMode: BigValueTextMode.Auto,
    },
  },
  bargauge: {
    field: { ...BY_THRESHOLD, ...EVERY },
    options: {
      ...REDUCED,
      displayMode: BarGaugeDisplayMode.Gradient,
      valueMode: BarGaugeValueMode.Color,
      namePlacement: BarGaugeNamePlacement.Auto,
      showUnfilled: true,
      minVizWidth: 8,
      minVizHeight: 16,
      maxVizHeight: 300,
    },
  },
  table: {
    field: { ...BY_THRESHOLD, ...EVERY, custom: { align: 'auto', cellOptions: { type: 'auto' }, inspect: false } },
    options: { showHeader: true, cellHeight: 'sm' },
  },
};

/** Every property that our panels may set; its editor, which Grafana keeps beside it, is never shown here. */
const registry = new FieldConfigOptionsRegistry(() =>
  [
    ...['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'thresholds', 'mappings', 'links'].map((id) => [id, false] as const),
    ...Object.keys(DEFAULTS['timeseries']!.field.custom!).map((id) => [id, true] as const),
    ...['align', 'cellOptions', 'inspect', 'width', 'hidden', 'fillBelowTo', 'lineStyle', 'hideFrom', 'axisSoftMin', 'axisSoftMax', 'axisLabel'].map((id) => [id, true] as const),
  ].map(
    ([id, isCustom]) =>
      ({
        id: isCustom ? `custom.${id}` : id,
        path: id,
        name: id,
        isCustom,
        editor: () => null,
        override: () => null,
        process: identityOverrideProcessor,
        shouldApply: () => true,
        settings: {},
      }) as unknown as FieldConfigPropertyItem
  )
);

standardTransformersRegistry.setInit(() =>
  // Two of its names are old ones of others.
  uniqBy(Object.values(standardTransformers), 'id')
    .map((each) => ({ id: each.id, name: each.name, transformation: each, editor: () => null }) as any)
);

/** Grafana's server would have these; a page that is opened as a file can fetch nothing. */
const ICONS: Record<string, string> = { 'arrow-down': arrowDown, 'arrow-up': arrowUp, 'info-circle': infoCircle };
window.fetch = async (asked) => {
  const icon = ICONS[/([\w-]+)\.svg$/.exec(String(asked))?.[1] ?? ''];
  return new Response(icon ?? '<svg xmlns="http://www.w3.org/2000/svg"/>', { headers: { 'Content-Type': 'image/svg+xml' } });
};

const asText = (value?: string) => value ?? '';

/** The frames of a panel as its component gets them. */
async function prepared(panel: Panel, frames: DataFrameDTO[], theme: GrafanaTheme2): Promise<DataFrame[]> {
  const data = frames.map((each) => toDataFrame(each));
  const transformed = panel.transformations
    ? await lastValueFrom(transformDataFrame(panel.transformations, data, { interpolate: asText }))
    : data;
  return applyFieldOverrides({
    data: transformed,
    fieldConfig: configured(panel),
    fieldConfigRegistry: registry,
    replaceVariables: asText,
    theme,
    timeZone: 'utc',
  });
}

function configured(panel: Panel): FieldConfigSource {
  const { defaults, overrides } = panel.fieldConfig;
  const filled = DEFAULTS[panel.type]!.field;
  return {
    defaults: {
      ...filled,
      ...defaults,
      ...(defaults.thresholds && { thresholds: levelled(defaults.thresholds) }),
      custom: { ...filled.custom, ...defaults.custom },
    },
    overrides: overrides.map((each) => ({
      ...each,
      properties: each.properties.map(({ id, value }) => ({ id, value: id === 'thresholds' ? levelled(value) : value })),
    })),
  };
}

/** JSON knows no infinity, so the lowest step has no value in it. */
function levelled(thresholds: ThresholdsConfig): ThresholdsConfig {
  return { ...thresholds, steps: thresholds.steps.map((step) => ({ ...step, value: step.value ?? -Infinity })) };
}

/** Of a panel that shows another time than the page, as `timeFrom` of its last so many days. */
function shown(panel: Panel, range: TimeRange): TimeRange {
  const days = Number(/^(\d+)d$/.exec(panel.timeFrom ?? '')?.[1] ?? 0);
  const from = days ? dateTime(range.to).utc().subtract(days, 'd') : range.from;
  return { ...range, from, raw: { from, to: range.to } };
}

interface Drawing {
  panel: Panel;
  data: DataFrame[];
  width: number;
  height: number;
  theme: GrafanaTheme2;
  range: TimeRange;
}

function Visual({ panel, data, width, height, theme, range }: Drawing) {
  const options = defaultsDeep({}, panel.options, DEFAULTS[panel.type]!.options);
  if (!data.some((frame) => frame.length > 0 && frame.fields.length > 0)) {
    return (
      <div className="empty" data-empty={panel.title}>
        No data
      </div>
    );
  }
  if (panel.type === 'timeseries') {
    return (
      <TimeSeries frames={data} structureRev={1} timeRange={shown(panel, range)} timeZone="utc" width={width} height={height} legend={options.legend}>
        {(config, aligned) => <TooltipPlugin data={aligned} config={config} mode={options.tooltip.mode} sortOrder={options.tooltip.sort} timeZone="utc" />}
      </TimeSeries>
    );
  }
  if (panel.type === 'table') {
    return <Table data={data[0]!} width={width} height={height} cellHeight={options.cellHeight} noHeader={!options.showHeader} initialSortBy={options.sortBy} />;
  }
  const values = (): FieldDisplay[] =>
    getFieldDisplayValues({
      fieldConfig: configured(panel),
      reduceOptions: options.reduceOptions,
      replaceVariables: asText,
      theme,
      data,
      sparkline: panel.type === 'stat' && options.graphMode !== BigValueGraphMode.None,
      timeZone: 'utc',
    });
  const bars = panel.type === 'bargauge';
  return (
    <VizRepeater
      source={data}
      getValues={values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      width={width}
      height={height}
      orientation={options.orientation}
      itemSpacing={bars && options.displayMode === BarGaugeDisplayMode.Lcd ? 2 : GAP}
      minVizWidth={options.minVizWidth}
      minVizHeight={options.minVizHeight}
      renderCounter={0}
      renderValue={({ value, width, height, orientation, alignmentFactors, count }) =>
        bars ? (
          <BarGauge
            value={value.display}
            field={value.field}
            display={value.view?.getFieldDisplayProcessor(value.colIndex!)}
            width={width}
            height={height}
            orientation={orientation}
            theme={theme}
            itemSpacing={GAP}
            lcdCellWidth={12}
            alignmentFactors={alignmentFactors}
            displayMode={options.displayMode}
            showUnfilled={options.showUnfilled}
            valueDisplayMode={options.valueMode}
            namePlacement={options.namePlacement}
            text={options.text}
          />
        ) : (
          <BigValue
            value={value.display}
            count={count}
            sparkline={value.sparkline}
            width={width}
            height={height}
            theme={theme}
            alignmentFactors={alignmentFactors}
            colorMode={options.colorMode}
            graphMode={options.graphMode}
            justifyMode={options.justifyMode}
            textMode={options.textMode}
            text={options.text}
          />
        )
      }
    />
  );
}

function Dashboard({ page, theme, drawn }: { page: Page; theme: GrafanaTheme2; drawn: Record<number, DataFrame[]> }) {
  const [width, setWidth] = useState(document.documentElement.clientWidth - 2 * MARGIN);
  useEffect(() => {
    const measure = () => setWidth(document.documentElement.clientWidth - 2 * MARGIN);
    window.addEventListener('resize', measure);
    return () => window.removeEventListener('resize', measure);
  }, []);
  const column = (width - (COLUMNS - 1) * GAP) / COLUMNS;
  const { panels } = page.dashboard;
  const range: TimeRange = {
    from: dateTime(page.from).utc(),
    to: dateTime(page.to).utc(),
    raw: { from: dateTime(page.from).utc(), to: dateTime(page.to).utc() },
  };
  const lowest = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <main style={{ padding: MARGIN }}>
      <header>
        <h1>{page.dashboard.title}</h1>
        <p>{page.dashboard.description}</p>
        <p className="chosen">
          {page.chosen.map(([name, value]) => (
            <span key={name}>
              {name} <b>{value}</b>
            </span>
          ))}
          <span>
            Time range{' '}
            <b>
              {range.from.format('YYYY-MM-DD HH:mm')} to {range.to.format('HH:mm')} UTC
            </b>
          </span>
          {page.note && <em>{page.note}</em>}
        </p>
      </header>
      <div style={{ position: 'relative', height: lowest * (ROW + GAP) }}>
        {panels.map((panel) => {
          const { x, y, w, h } = panel.gridPos;
          const place = { left: x * (column + GAP), top: y * (ROW + GAP), width: w * column + (w - 1) * GAP, height: h * ROW + (h - 1) * GAP };
          return (
            <section key={panel.id} style={{ position: 'absolute', ...place }}>
              {panel.type === 'row' ? (
                <h2>{panel.title}</h2>
              ) : (
                <PanelChrome title={panel.title} description={panel.description} titleItems={panel.timeFrom && <span className="time">Last {panel.timeFrom}</span>} width={place.width} height={place.height}>
                  {(innerWidth: number, innerHeight: number) => (
                    <Visual panel={panel} data={drawn[panel.id] ?? []} width={innerWidth} height={innerHeight} theme={theme} range={range} />
                  )}
                </PanelChrome>
              )}
            </section>
          );
        })}
      </div>
    </main>
  );
}

async function draw() {
  const page: Page = JSON.parse(document.getElementById('page')!.textContent!);
  const theme = createTheme({ colors: { mode: new URLSearchParams(location.search).get('theme') === 'light' ? 'light' : 'dark' } });
  // Pictures of text are measured when they are drawn, in the font that is there by then.
  await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 14px Inter`)));
  const drawn: Record<number, DataFrame[]> = {};
  for (const panel of page.dashboard.panels.filter(({ type }) => type !== 'row')) {
    drawn[panel.id] = await prepared(panel, page.answers[panel.id] ?? [], theme);
  }
  const panels = { eventsScope: 'preview', eventBus: new EventBusSrv(), sync: () => DashboardCursorSync.Crosshair };
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <PanelContextProvider value={panels as any}>
        <Dashboard page={page} theme={theme} drawn={drawn} />
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
  requestAnimationFrame(() => requestAnimationFrame(() => (document.body.dataset['drawn'] = 'yes')));
}

void draw();
